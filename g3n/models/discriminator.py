"""A patch discriminator in 3D and both sides of its game in one forward, for a trainer with one optimizer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from g3n.config import G3nError
from g3n.models.decoder import Tokenizer, TokenizerConfig

_CHANNELS = (32, 64, 128)


class PatchDiscriminator(nn.Module):
    """[B, X, Y, Z] -> scores [B, x, y, z] of overlapping patches of 38^3 voxels, high for real ones (Isola 2017, in 3D).

    Without norms: those of a batch would mix samples, and spectral norm keeps float32 state that bf16 weights do not fit.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, *_CHANNELS)
        self.down = nn.ModuleList(
            nn.Conv3d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.score = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, x_BXYZ: Tensor) -> Tensor:
        x = x_BXYZ[:, None].to(self.score.weight.dtype)
        for convolution in self.down:
            x = F.leaky_relu(convolution(x), 0.2)
        return self.score(x)[:, 0].float()


def both_sides(discriminator: nn.Module, made_BXYZ: Tensor, real_BXYZ: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge losses (Lim 2017, arXiv 1705.02894) of generator and discriminator, each float32 [B], for one backward of their sum.

    The first reaches ``made_BXYZ`` alone (the discriminator's weights are constants in it), the second the weights alone.
    """
    real, fake = discriminator(real_BXYZ), discriminator(made_BXYZ.detach())
    of_discriminator = (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3))
    constants = {name: p.detach() for name, p in discriminator.named_parameters()}
    of_generator = -functional_call(discriminator, constants, (made_BXYZ,)).mean(dim=(1, 2, 3))
    return of_generator, of_discriminator


class AdversarialTokenizer(Tokenizer):
    """The tokenizer with the discriminator that judges its volumes from step ``start`` on. Names of weights are the tokenizer's.

    One AdamW holds the weights of both; its moments are each weight's own, so that is two optimizers with one rate, except that
    gradients are clipped by their common norm.
    """

    def __init__(
        self, config: TokenizerConfig, encoder_width: int, tokens: tuple[int, int, int], patch: int, start: int
    ) -> None:
        super().__init__(config, encoder_width, tokens, patch)
        self.discriminator = PatchDiscriminator()
        self.start = self.train_step = start  # the trainer sets train_step before each step; untold, all is counted

    def forward(  # type: ignore[override]
        self, features_BND: Tensor, noise_BNC: Tensor | None = None, real_BXYZ: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """As the tokenizer's; with ``real_BXYZ`` (z-scored, 0 outside of the brain) also ``both_sides``.

        What is drawn outside of the real brain is not judged. Before ``start`` the losses are the constants 0 and 2, those of a
        discriminator that says 0 to everything: the sum does not jump when it begins. Raises G3nError under ZeRO stage 3, which has a weight only
        while its own layer is called.
        """
        output = super().forward(features_BND, noise_BNC)
        if real_BXYZ is None:
            return output
        if hasattr(self.discriminator.score.weight, "ds_id"):
            raise G3nError("model.adversarial_weight needs whole weights on each rank; set trainer.zero_stage 1 or 2")
        if self.train_step < self.start:
            undecided = real_BXYZ.new_zeros(len(real_BXYZ))
            return output, undecided, undecided + 2
        made = output[:, 0].float().where(real_BXYZ != 0, 0.0)
        return output, *both_sides(self.discriminator, made, real_BXYZ)
