"""Is a forecast nearer to the follow-up than the baseline is?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from g3n.config import G3nError
from g3n.evaluate.anatomy import measure
from g3n.evaluate.metrics import psnr_db
from g3n.evaluate.montage import write_montage
from g3n.evaluate.report import means, print_means, write_csv, write_json
from g3n.flow import integrate
from g3n.generate import Generator
from g3n.meters import progress_bar
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from g3n.tasks.base import randn_like_samples
from g3n.tasks.forecast import elapsed_gate, gated, start_from, with_elapsed, with_history

COLUMNS = ("psnr_db", "no_change_psnr_db", "psnr_gain_db", "ventricle_error_ml", "no_change_ventricle_error_ml")


@torch.no_grad()
def evaluate_forecasting(
    generator: Generator, latents: str, output: Path, split: str = "val", steps: int = 25, batch: int = 8
) -> dict[str, Any]:
    """Write ``metrics.json``, ``pairs.csv`` and ``forecast.png`` to ``output`` and return the metrics.

    First to last visit of every subject and modality of ``split``. Everything is compared after decoding, with the decoded
    follow-up: what is judged is the forecaster, not the tokenizer. ``no_change`` takes the baseline for the forecast.
    """
    index = load_index(latents)
    if index.kind != "latent" or index.raw["tokenizer"]["fingerprint"] != generator.space.tokenizer_fingerprint:
        raise G3nError(f"'{latents}' are not latents of the tokenizer of '{generator.run.path}'; encode again")
    rows: list[dict[str, Any]] = []
    picture: tuple[float, list[tuple[str, Any]]] = (-1.0, [])
    space = generator.space
    with progress_bar() as progress:
        bar = progress.add_task("forecast", total=None)
        for b in eval_batches(index, None, "pair", split, batch, rank=0, world=1, seed=0, history=generator.history):
            elapsed = b.tensors["elapsed_years"]
            cond_BV = generator.variables.encode(with_elapsed(b.variables, elapsed)).to(generator.device)
            source, target = (space.standardize(b.tensors[k].to(generator.device)) for k in ("baseline", "target"))
            noise = randn_like_samples(b.seeds, tuple(source.shape[1:])).to(generator.device)
            gate_B = elapsed_gate(elapsed.to(generator.device), generator.gate_years)
            start = start_from(source, noise, generator.start_noise, gate_B)
            velocity, read = gated(generator.model, gate_B), source
            if generator.history > 1:
                earlier, years = (b.tensors[k].to(generator.device) for k in ("earlier", "earlier_years"))
                read = with_history(source, space.standardize(earlier), years)
            made = integrate(lambda x, t: velocity(x, t, cond_BV, read), start, steps, shift=generator.shift)  # noqa: B023
            baseline, follow_up, forecast = (space.decode(z).cpu() for z in (source, target, made))
            ours, none = psnr_db(forecast, follow_up), psnr_db(baseline, follow_up)
            for i in range(len(b)):
                if b.weights[i] == 0:
                    continue
                modality = str(b.variables[i].get("modality"))
                ml = [
                    measure(v[i].numpy(), generator.grid, modality).ventricle_ml
                    for v in (baseline, follow_up, forecast)
                ]
                rows.append(
                    {
                        "key": b.keys[i],
                        "modality": modality,
                        "elapsed_years": float(elapsed[i]),
                        "psnr_db": float(ours[i]),
                        "no_change_psnr_db": float(none[i]),
                        "psnr_gain_db": float(ours[i] - none[i]),
                        "ventricle_error_ml": abs(ml[2] - ml[1]),
                        "no_change_ventricle_error_ml": abs(ml[0] - ml[1]),
                    }
                )
                if float(elapsed[i]) > picture[0]:
                    shown = [("baseline", baseline[i]), ("follow-up", follow_up[i]), ("forecast", forecast[i])]
                    picture = float(elapsed[i]), [(name, v.numpy()) for name, v in shown]
            progress.advance(bar, len(b))
    if not rows:
        raise G3nError(f"latents '{latents}' have no subject with two visits in split '{split}'")
    result = {"run": str(generator.run.path), "split": split, "pairs": len(rows), **means(rows, COLUMNS)}
    write_csv(output / "pairs.csv", rows)
    write_montage(output / "forecast.png", picture[1], f"{picture[0]:.1f} years")
    write_json(output / "metrics.json", result)
    print_means(f"forecasts of {len(rows)} {split} pairs", {"all": {"n": len(rows), **means(rows, COLUMNS)}})
    return result
