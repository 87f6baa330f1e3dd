"""The adaptive threshold: its long-run rate under drift, and what it must not do."""

import numpy as np
import pytest

from dylora_stream.core.conformal import AdaptiveAlpha, AdaptiveConfig


def drifting(rng: np.random.Generator, rows: int) -> np.ndarray:
    """p-values of known rows of a stream that drifts: uniform at first, then ever more often tiny, then too large."""
    uniform = rng.random(rows)
    share = np.concatenate([np.zeros(rows // 3), np.full(rows // 3, 0.4), np.zeros(rows - 2 * (rows // 3))])
    tiny = np.where(rng.random(rows) < share, 0.02 * rng.random(rows), uniform)
    tiny[2 * (rows // 3) :] = tiny[2 * (rows // 3) :] ** 0.3
    return tiny


@pytest.mark.parametrize("target", [0.05, 0.01])
def test_the_long_run_rate_holds_under_drift(target: float) -> None:
    """Within 0.02 of the target, where a fixed threshold is far off."""
    p_values = drifting(np.random.default_rng(3), 3000)
    control = AdaptiveAlpha(AdaptiveConfig(target=target))
    called = []
    for p_value in p_values.tolist():
        called.append(control.calls(p_value))
        control.update(called[-1])
    assert abs(np.mean(called) - target) <= 0.02
    middle = p_values[1000:2000]
    assert (middle <= target).mean() > target + 0.1


def test_the_rate_holds_whatever_the_stream_does() -> None:
    """The bound of the paper, (1 + rate) / (rate · T), on the worst stream: every p-value 0, then every one 1."""
    config = AdaptiveConfig()
    control = AdaptiveAlpha(config)
    called = []
    for p_value in [0.0] * 700 + [1.0] * 350:
        called.append(control.calls(p_value))
        control.update(called[-1])
    assert abs(np.mean(called) - config.target) <= (1 + config.rate) / (config.rate * len(called))


def test_deciding_moves_nothing_and_what_is_uncalibrated_is_novel() -> None:
    """Only feedback moves alpha: down after a false alarm, up after a right answer."""
    control = AdaptiveAlpha(AdaptiveConfig())
    assert control.calls(float("nan"))
    assert control.calls(0.05)
    assert not control.calls(0.06)
    assert control.alpha == AdaptiveConfig().target
    control.update(is_known_and_called_novel=True)
    low = control.alpha
    assert low < AdaptiveConfig().target
    control.update(is_known_and_called_novel=False)
    assert control.alpha > low


def test_wrong_settings_of_the_adaptive_threshold_are_refused() -> None:
    """With a message that names the field."""
    for wrong in ({"target": 0.0}, {"rate": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdaptiveConfig(**wrong)
