"""What is said of one image, and of each keyframe that it may show the place of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.calibration import features
from vpr_lite_ros.database import Keyframe
from vpr_lite_ros.inference import Description
from vpr_lite_ros.matching import EpipolarFit, Matches, Status
from vpr_lite_ros.metric_pose import MetricFit


@dataclass
class Candidate:
    """One keyframe that retrieval proposed, and how far it came."""

    keyframe: Keyframe
    similarity: float
    """Of the global descriptors, a cosine: see ``descriptors.py``."""
    rank: int
    """Place in the retrieval list, 0 first."""
    match_score: float = math.nan
    """Transported mass, 0…1; NaN where the pair was not matched."""
    matches: Matches | None = None
    points: NDArray[np.float64] | None = None
    """(M, 2) of the matches: where the keyframe shows what lies at the query's patches, fractions
    of the image. Found between the keyframe's patches."""
    found: NDArray[np.bool_] | None = None
    """(M,) around which of these the two small pictures correlate ..."""
    found_points: NDArray[np.floating] | None = None
    """... and (M, 2) where exactly, as ``points``."""
    fit: EpipolarFit | None = None
    """None where a camera is not known or no motion was found."""
    refined: EpipolarFit | None = None
    """Of a closure: ``fit`` once more, by the points that were ``found``; its inliers are of these.
    """
    metric: MetricFit | None = None
    """Of a closure, one of whose images has depth."""
    agreement: int = 0
    """Matches that agree with each other: with one motion of the camera, or, where no camera is
    known, with one homography."""
    num_correlated: int = 0
    """Of the matches that were ``found``, those that agree with one motion of whatever camera."""
    zoom: float = math.nan
    """Logarithm of how much larger the query shows what both show; NaN where not matched."""
    confidence_alone: float = math.nan
    """P(same place) by this image, 0…1; NaN where the pair was not matched or the model is not
    calibrated."""
    confidence: float = math.nan
    """... and by the keyframes before it, where they count."""
    has_camera: bool | None = None
    """Whether both cameras are known; None where the geometry was not checked."""
    agreeing: int = 0
    """Keyframes in a row, this one included, that point to this stretch of the map."""
    apart_m: float = math.nan
    """How far from here odometry has the keyframe; NaN where it does not know."""
    travelled_m: float = math.nan
    """... and how far the robot has driven since."""
    status: Status = Status.NOT_BEST

    @property
    def motion(self) -> EpipolarFit | None:
        """The best that is known of the way between the two cameras, without metres."""
        return self.refined or self.fit

    @property
    def num_matches(self) -> int:
        return len(self.matches) if self.matches else 0

    @property
    def num_inliers(self) -> int:
        return int(self.fit.inliers.sum()) if self.fit else 0


@dataclass
class Decision:
    """What the detector made of one image."""

    stamp_ns: int
    keyframe_id: int | None = None
    """Id under which the image was stored; None if it is no keyframe, or nothing is stored."""
    candidates: list[Candidate] = field(default_factory=list)
    """In order of retrieval, each with its status."""
    closure: Candidate | None = None
    """The accepted candidate, if there is one."""
    new_session: str = ""
    """Name of the session that began with this image, where the clock had gone back."""
    fault: str = ""
    """Why the keyframe could not be stored, where it could not."""
    description: Description | None = None
    """What the network says of the image, if it was asked."""
    is_keyframe: bool = False
    """Whether the image was looked up. In mode localization no keyframe is stored."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds by stage: resize, place, search, match, verify, refine, store."""

    @property
    def recognised(self) -> Candidate | None:
        """The closure, or what would be one had there not been one just before."""
        wanted = Status.ACCEPTED, Status.TOO_SOON
        return next((one for one in self.candidates if one.status in wanted), None)

    @property
    def latency_ms(self) -> float:
        return sum(self.timings_ms.values())


def sureness(candidate: Candidate) -> tuple[float, int]:
    """What matched candidates are ranked by: confidence, or else match score, then retrieval."""
    known = not math.isnan(candidate.confidence)
    return candidate.confidence if known else candidate.match_score, -candidate.rank


def features_of(candidate: Candidate) -> list[float]:
    """What the calibration knows of a matched candidate."""
    return features(
        candidate.similarity,
        candidate.match_score,
        candidate.agreement,
        candidate.num_correlated,
        candidate.zoom,
    )
