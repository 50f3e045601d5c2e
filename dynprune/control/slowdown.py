"""Estimates how much slower than on an idle machine inferences run now, from the logarithms of observed over predicted time."""

from __future__ import annotations

_PRIOR_DEVIATION = 0.05
"""Of the mean before anything was observed: calibration and serving differ by some percent."""
_LEAST_NOISE = 0.02**2
"""Variance; the same inference repeated on an idle machine varies by about 2 %."""
_MOST_NOISE = 1.0
_NOISE_RATE = 0.05
"""Share of the newest observation in the estimated noise."""
_DRIFT = 0.04
"""Random-walk variance per inference as a share of the noise: the filter's gain settles at 0.18."""
_OUTLIER_SQUARED = 3.0**2
"""Square of the deviations from which an observation counts as a jump rather than noise."""
_TRUST_RATE = 0.4
"""Share of the newest lone outlier in the trust: two in a row that do not last end it, one lasting jump restores it."""


class SlowdownEstimator:
    """A Kalman filter on the logarithm of the slow-down factor, with a step detector (0 is idle speed, log 2 is half of it).

    The state is a random walk seen through noise, and the noise is learned from the innovations (clipped, so that no single one
    dominates). An observation more than three deviations away is a step or a spike. Upwards it is believed at once; when the next
    one is back where the state was, the jump is undone, and after two such false alarms a step must show twice to be believed.
    Downwards it always must show twice.

    Attributes:
        mean: estimated logarithm of the slow-down factor.
        variance: of the next observation around `mean`: uncertainty of the mean, drift and noise.
        on_trial: whether the last observation was taken for a step upwards that the next one may still show to have been a spike.
        mean_before: `mean` before that step; `mean` itself where none is on trial.
    """

    __slots__ = ("_before_jump", "_doubted_side", "_noise", "_trust", "_uncertainty", "mean", "on_trial", "variance")

    def __init__(self) -> None:
        self.mean = 0.0
        self.variance = _PRIOR_DEVIATION**2 + (1 + _DRIFT) * _LEAST_NOISE
        self.on_trial = False
        self._uncertainty = _PRIOR_DEVIATION**2
        self._noise = _LEAST_NOISE
        self._trust = 1.0
        self._before_jump = (0.0, 0.0)
        self._doubted_side = 0

    @property
    def mean_before(self) -> float:
        return self._before_jump[0] if self.on_trial else self.mean

    def update(self, log_ratio: float) -> None:
        """Takes in one observation: the logarithm of observed over predicted time, a finite number."""
        if self.on_trial:
            self._judge_jump(log_ratio)
        noise = self._noise
        predicted = self._uncertainty + _DRIFT * noise
        variance = predicted + noise
        innovation = log_ratio - self.mean
        squared = innovation * innovation
        most = _OUTLIER_SQUARED * variance
        if squared <= most:
            gain = predicted / variance
            self.mean += gain * innovation
            self._uncertainty = (1 - gain) * predicted
            self._doubted_side = 0
        else:
            squared = most
            self._outlier(log_ratio, 1 if innovation > 0 else -1)
        noise += _NOISE_RATE * (squared - predicted - noise)
        if noise < _LEAST_NOISE:
            noise = _LEAST_NOISE
        elif noise > _MOST_NOISE:
            noise = _MOST_NOISE
        self._noise = noise
        self.variance = self._uncertainty + (1 + _DRIFT) * noise

    def _outlier(self, log_ratio: float, side: int) -> None:
        """Takes an observation for a step, or waits for the next one to tell."""
        if side == self._doubted_side:
            self._jump(log_ratio)
            if side > 0:
                self._trust += _TRUST_RATE * (1 - self._trust)
        elif side > 0 and self._trust >= 0.5:
            self._before_jump = self.mean, self._uncertainty
            self._jump(log_ratio)
            self.on_trial = True
        else:
            self._doubted_side = side

    def _jump(self, log_ratio: float) -> None:
        self.mean = log_ratio
        self._uncertainty = self._noise
        self._doubted_side = 0

    def _judge_jump(self, log_ratio: float) -> None:
        """Undoes the last jump when `log_ratio` is nearer to where the state was before it."""
        mean, uncertainty = self._before_jump
        lasted = abs(log_ratio - self.mean) <= abs(log_ratio - mean)
        if not lasted:
            self.mean, self._uncertainty = mean, uncertainty
        self._trust += _TRUST_RATE * (lasted - self._trust)
        self.on_trial = False
