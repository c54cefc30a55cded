"""Probes are scikit-learn's, figures are scikit-learn's, and tests hold their level where naive ones do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from g3n.evaluate import intervals
from g3n.probing import fits, scores, significance
from g3n.probing.align import Encoder
from g3n.probing.folds import Folds, plan_folds
from g3n.probing.judge import Judged, better_than_chance, judge, paired_z
from g3n.probing.tasks import Selection


def made(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Correlated columns far from standardized."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * 0.3 + 5


@pytest.mark.parametrize(("n", "d", "classes"), [(300, 40, 2), (120, 200, 2), (300, 20, 4)])
def test_logistic_is_that_of_scikit_learn(n: int, d: int, classes: int) -> None:
    """All training sets and penalties at once: the log odds of each model, balanced classes, intercept not penalized."""
    x, rng = made(n, d), np.random.default_rng(1)
    y = (x[:, :classes] - x[:, :classes].mean(0) + x[:, :classes].std(0) * rng.standard_normal((n, classes))).argmax(1)
    y[rng.random(n) < 0.3] = 0  # unequal classes
    fold = rng.integers(0, 5, n)
    ready, scaled = fits.prepare(x)
    models = [(subset, alpha) for subset in ((0, 1, 2), (1, 3, 4), (4,)) for alpha in fits.PENALTIES]
    found = fits.logistic(ready, y, classes, fold, models, fits.Folds(ready, fold, y, classes, scaled))
    for m, (subset, alpha) in enumerate(models):
        train = np.isin(fold, subset)
        solver = LogisticRegression(C=1 / (alpha * train.sum()), class_weight="balanced", max_iter=10_000, tol=1e-8)
        known = make_pipeline(StandardScaler(), solver).fit(x[train], y[train]).decision_function(x)
        ours = found[:, m]
        known = known[:, None] if classes == 2 else known - known.mean(axis=1, keepdims=True)
        ours = ours if classes == 2 else ours - ours.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(ours, known, atol=5e-3 * np.abs(known).max())


@pytest.mark.parametrize(("n", "d"), [(300, 40), (120, 200)])
def test_ridge_is_that_of_scikit_learn(n: int, d: int) -> None:
    x, rng = made(n, d), np.random.default_rng(1)
    y = x[:, 0] + 3 * rng.standard_normal(n) + 50
    fold = rng.integers(0, 5, n)
    ready, scaled = fits.prepare(x)
    models = [(subset, alpha) for subset in ((0, 1, 2), (1, 3, 4)) for alpha in fits.PENALTIES]
    found = fits.ridge(ready, y, models, fits.Folds(ready, fold, np.zeros(n, np.int64), 1, scaled))
    for m, (subset, alpha) in enumerate(models):
        train = np.isin(fold, subset)
        known = make_pipeline(StandardScaler(), Ridge(alpha=alpha * train.sum())).fit(x[train], y[train]).predict(x)
        np.testing.assert_allclose(found[:, m, 0], known, atol=1e-3 * known.std())


def test_penalties_are_chosen_inside_the_training_folds() -> None:
    """The scores of a fold are those of the penalty that a plain loop over the other folds finds best; none of the fold's labels
    is looked at."""
    n = 150
    x, rng = made(n, 30), np.random.default_rng(2)
    y = x[:, 0] + 2 * rng.standard_normal(n)
    fold, judged = np.arange(n) % 5, rng.random(n) < 0.8
    ready, scaled = fits.prepare(x)
    found = fits.fit_repeat(ready, y, 1, fold, judged, scaled)

    def predict(subset: tuple[int, ...], alpha: float, rows: np.ndarray) -> np.ndarray:
        train = np.isin(fold, subset)
        model = make_pipeline(StandardScaler(), Ridge(alpha=alpha * train.sum())).fit(x[train], y[train])
        return np.asarray(model.predict(x[rows]))

    for a in range(5):
        losses = np.zeros(len(fits.PENALTIES))
        for b in set(range(5)) - {a}:
            rows = judged & (fold == b)
            subset = tuple(set(range(5)) - {a, b})
            losses += [((predict(subset, alpha, rows) - y[rows]) ** 2).mean() for alpha in fits.PENALTIES]
        best = fits.PENALTIES[int(losses.argmin())]
        assert found.penalties[a] == best
        others = tuple(set(range(5)) - {a})
        np.testing.assert_allclose(found.score[fold == a, 0], predict(others, best, fold == a), atol=2e-3 * y.std())
    changed = np.where(fold == 3, -10 * y, y)
    again = fits.fit_repeat(ready, changed, 1, fold, judged, scaled)
    np.testing.assert_allclose(again.score[fold == 3], found.score[fold == 3], atol=2e-3 * y.std())


def test_wide_features_are_probed_through_their_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotating n scans to their n - 1 axes keeps all distances, so ridge on standardized columns stays what it was."""
    monkeypatch.setattr(fits, "MAX_WIDTH", 100)
    x = made(80, 150)
    ready, scaled = fits.prepare(x)
    assert ready.shape == (80, 80)
    assert not scaled
    standard = StandardScaler().fit_transform(x)
    np.testing.assert_allclose(ready @ ready.T, standard @ standard.T, atol=1e-2)
    more, scaled = fits.prepare(made(300, 150))
    assert more.shape == (300, 100)
    assert not scaled


# --- figures


def test_figures_are_those_of_scikit_learn_where_scans_count_several_times() -> None:
    rng = np.random.default_rng(0)
    n = 120
    code, fold = rng.integers(0, 2, n), np.zeros(n, np.int64)
    score = np.round(code + rng.standard_normal(n), 1)[:, None]  # ties
    weight = np.stack([np.ones(n), rng.integers(0, 4, n).astype(float)])
    found = scores.of_classes(score, code, 2, fold, weight)
    for b, w in enumerate(weight):
        assert found["auroc"][b] == pytest.approx(roc_auc_score(code, score[:, 0], sample_weight=w))
        assert found["auprc"][b] == pytest.approx(average_precision_score(code, score[:, 0], sample_weight=w))
        known = balanced_accuracy_score(code, score[:, 0] > 0, sample_weight=w)
        assert found["balanced_accuracy"][b] == pytest.approx(known)
    code, many = rng.integers(0, 4, n), rng.standard_normal((n, 4))
    found = scores.of_classes(many, code, 4, fold, weight[:1])
    each = [roc_auc_score(code == c, many[:, c]) for c in range(4)]
    assert found["auroc"][0] == pytest.approx(np.mean(each))


def test_pairs_are_of_one_fold_and_r_is_about_the_means_of_folds() -> None:
    """Two folds whose scores lie on different scales: 3 of 4 and 1 of 1 pairs right, whatever the offset between folds."""
    code, fold = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 1, 1])
    score = np.array([1.0, 3.0, 2.0, 4.0, 100.0, 101.0])
    ones = np.ones((1, 6))
    assert scores.auroc(score, code == 1, fold, ones)[0] == pytest.approx(4 / 5)
    y = np.array([1.0, 2.0, 3.0, 6.0, 5.0, 8.0])
    mean = np.array([6.5] * 4 + [3.0] * 2)
    found = scores.of_numbers(mean, y, fold, mean, ones)  # the mean predictor
    assert np.isnan(found["r"][0])
    assert found["r2"][0] == pytest.approx(0)
    shifted = y + np.where(fold == 0, 7.0, -7.0)
    found = scores.of_numbers(shifted, y, fold, np.full(6, y.mean()), ones)
    assert found["r"][0] == pytest.approx(1)
    assert found["mae"][0] == pytest.approx(7)
    assert found["r2"][0] == pytest.approx(r2_score(y, shifted))


def test_intervals_of_many_figures_are_those_of_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values, subjects = rng.standard_normal(60), np.repeat(np.arange(20), 3)
    known = intervals.bootstrap(np.mean, values, subjects=[f"{s:02d}" for s in subjects], draws=200)
    found = intervals.resampled(
        lambda c: {"mean": c[:, subjects] @ values / c[:, subjects].sum(axis=1)}, 20, 60, draws=200
    )
    assert found["mean"].value == pytest.approx(known.value)
    assert (found["mean"].low, found["mean"].high) == (pytest.approx(known.low), pytest.approx(known.high))
    assert (found["mean"].n, found["mean"].subjects) == (60, 20)


# --- tests


def test_the_influence_of_scans_gives_delongs_variance() -> None:
    rng = np.random.default_rng(0)
    code, fold = np.array([1] * 12 + [0] * 18), np.zeros(30, np.int64)
    score = code + rng.standard_normal(30)
    area, influence = significance.auroc_influence(score[:, None], code, 2, fold)
    won = (score[:12, None] > score[None, 12:]).astype(float)
    assert area == pytest.approx(won.mean())
    delong = won.mean(axis=1).var(ddof=1) / 12 + won.mean(axis=0).var(ddof=1) / 18
    assert (influence**2).sum() / 30**2 == pytest.approx(delong)
    assert influence.sum() == pytest.approx(0, abs=1e-9)
    # scores of another fold on another scale change neither: its pairs are its own
    both = np.concatenate([score, 100 - score])[:, None]
    twice, _ = significance.auroc_influence(both, np.tile(code, 2), 2, np.repeat([0, 1], 30))
    assert twice == pytest.approx((area + 1 - area) / 2)


def test_permuted_labels_are_fitted_again() -> None:
    """The statistic of each permutation is that of scikit-learn's ridge on the permuted labels of the training folds."""
    n, rng = 60, np.random.default_rng(0)
    x, fold = fits.prepare(rng.standard_normal((n, 7)) @ rng.standard_normal((7, 7)))[0], np.arange(n) % 5
    y = rng.standard_normal(n)
    order = np.concatenate([np.arange(n)[None], *(rng.permutation(n)[None] for _ in range(3))])
    rows = [np.flatnonzero(fold == f) for f in range(5)]
    probes = [significance._Probe(x, [other for other in rows if other is not own], own) for own in rows]
    labels = y[order].T[..., None].astype(np.float32)
    found = significance._statistic(x, labels, rows, probes)
    for p, permuted in enumerate(y[order]):
        of_penalty = []
        for alpha in fits.PENALTIES:
            r = []
            for own in rows:
                train = np.setdiff1d(np.arange(n), own)
                model = Ridge(alpha=alpha * len(train)).fit(x[train], permuted[train])
                r.append(np.corrcoef(model.predict(x[own]), permuted[own])[0, 1] * len(own) / n)
            of_penalty.append(sum(r))
        assert found[p] == pytest.approx(max(of_penalty), abs=1e-4)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_chance_holds_its_level_and_sees_effects(classes: int) -> None:
    """200 nulls: 4 to 17 below 0.05 in 95 % of such runs. Wide and narrow features."""
    p_null, p_true = [], []
    for seed in range(200):
        rng = np.random.default_rng([3, seed])
        n, d = 50, 100 if seed % 2 else 5
        x, value = rng.standard_normal((n, d)), rng.standard_normal(n)
        y = value if classes == 1 else np.digitize(value, [0.3] if classes == 2 else [-0.4, 0.4]).astype(float)
        fold = plan_folds(np.arange(n), np.arange(n), y if classes > 1 else np.zeros(n), 5, 1, seed).fold_RN[0]
        p_null.append(significance.chance_p(x, y, classes, fold, 99, seed))
        if seed < 20:
            p_true.append(significance.chance_p(x[:, :10] + 2 * value[:, None], y, classes, fold, 99, seed))
    assert 4 <= (np.array(p_null) <= 0.05).sum() <= 17
    assert np.mean(np.array(p_null) <= 0.5) == pytest.approx(0.5, abs=0.1)
    assert np.max(p_true) == 0.01


def compared(tasks: int, classes: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """z of two probes of which the first sees ``effect`` and the second nothing, and of one of them and chance whose folds are
    taken for independent."""
    two, naive = [], []
    for seed in range(tasks):
        rng = np.random.default_rng([7, seed])
        n, d = 60, 8
        x, other = rng.standard_normal((2, n, d))
        value = rng.standard_normal(n)
        x[:, 0] += effect * value
        y = value if classes == 1 else np.digitize(value, [0.3] if classes == 2 else [-0.4, 0.4]).astype(float)
        people, names = np.arange(n), ("a", "b", "c")[:classes] if classes > 1 else ()
        folds = plan_folds(people, people, y if classes > 1 else np.zeros(n), 5, 2, seed)
        selection = Selection(people, y, names)
        one, second = (judge(Encoder(k, "", a), selection, folds) for k, a in (("x", x), ("other", other)))
        two.append(paired_z(one, second, selection, folds, people))
        fold, score = folds.fold_RN[0], one.repeats[0].score[:, 0]
        r = [np.corrcoef(score[fold == f], y[fold == f])[0, 1] for f in range(5)]
        naive.append(np.sum(r) * np.sqrt(n / 5 - 1) / np.sqrt(5))
    return np.array(two), np.array(naive)


@pytest.mark.parametrize("classes", [3, 2, 1])
def test_200_null_tasks(classes: int) -> None:
    """Two encoders that know nothing: at most 17 of 200 (10 of 100) differ at 5 %; taking folds for independent calls more better than
    chance."""
    z, naive = compared(200 if classes < 3 else 100, classes, 0.0)
    p = np.array([significance.p_different(one) for one in z])
    assert (p < 0.05).sum() <= (17 if classes < 3 else 10)
    assert 0.5 < np.std(z) < 1.15  # 1 were exact
    if classes < 3:  # the first class's log odds go with no label's number
        assert (norm.sf(naive) < 0.05).sum() > 17


@pytest.mark.parametrize("classes", [2, 1])
def test_a_better_encoder_is_found(classes: int) -> None:
    z, _ = compared(20, classes, 4.0)
    assert (z > 2).all()


def test_a_probe_beside_itself_is_no_better() -> None:
    rng = np.random.default_rng(0)
    people, y = np.arange(60), rng.integers(0, 2, 60).astype(float)
    folds = plan_folds(people, people, y, 5, 1, 0)
    selection = Selection(people, y, ("a", "b"))
    one = judge(Encoder("x", "", rng.standard_normal((60, 4))), selection, folds)
    assert paired_z(one, Judged("same", "", one.repeats), selection, folds, people) == 0
    perfect, constant = (Judged("", "", (fits.OutOfFold(s[:, None], ()),)) for s in (y, np.zeros(60)))
    assert paired_z(perfect, constant, selection, folds, people) > 3  # no variance left to see is no reason for z = 0


def test_siblings_count_as_one_person() -> None:
    """Everybody twice: as siblings z stays what it was, as people it grows by the root of 2."""
    rng = np.random.default_rng(0)
    n = 100
    y, fold = np.tile(rng.integers(0, 2, n).astype(float), 2), np.tile(np.arange(n) % 5, 2)
    a, b = np.tile(y[:n] + rng.standard_normal(n), 2)[:, None], np.tile(rng.standard_normal(n), 2)[:, None]
    folds = Folds(fold[None], np.ones((1, 2 * n), bool))
    one, other = (Judged("", "", (fits.OutOfFold(s, ()),)) for s in (a, b))
    selection = Selection(np.arange(2 * n), y, ("a", "b"))
    once = paired_z(
        *(Judged("", "", (fits.OutOfFold(s[:n], ()),)) for s in (a, b)), Selection(np.arange(n), y[:n], ("a", "b")),
        Folds(fold[None, :n], np.ones((1, n), bool)), np.arange(n),
    )  # fmt: skip
    siblings = paired_z(one, other, selection, folds, np.tile(np.arange(n), 2))
    people = paired_z(one, other, selection, folds, np.arange(2 * n))
    assert siblings == pytest.approx(once, rel=0.06)
    assert people == pytest.approx(once * np.sqrt(2), rel=0.06)


def test_twins_are_no_two_people_to_the_test_of_chance() -> None:
    """100 nulls of 30 pairs of twins alike in all: taking each for a person would see effects in a third of them."""
    p = []
    for seed in range(100):
        rng = np.random.default_rng([5, seed])
        x, y = np.tile(rng.standard_normal((30, 6)), (2, 1)), np.tile(rng.standard_normal(30), 2)
        group = np.tile(np.arange(30), 2)
        folds = plan_folds(group, np.arange(60), np.zeros(60), 5, 1, seed)
        p.append(better_than_chance(Encoder("x", "", x), Selection(np.arange(60), y, ()), folds, group))
    assert (np.array(p) < 0.05).sum() <= 10


def test_corrections_are_those_of_holm_and_benjamini_hochberg() -> None:
    rows = [{"p": p} for p in (0.01, 0.04, None, 0.03)]
    significance.corrected(rows)
    assert [r["p_holm"] for r in rows] == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    assert [r["q_bh"] for r in rows] == [pytest.approx(0.03), pytest.approx(0.04), None, pytest.approx(0.04)]
