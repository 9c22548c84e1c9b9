"""The way of an image: keyframe or not, described, looked up, matched, judged, stored.

``LoopDetector.process`` tells the story; every step before and after it lives in its own module.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vpr_lite_ros.calibration import sequential
from vpr_lite_ros.candidate import Candidate, Decision, features_of, sureness
from vpr_lite_ros.config import Config
from vpr_lite_ros.database import DatabaseError, Keyframe, KeyframeDatabase, Pose
from vpr_lite_ros.depth import Depth, sample_depth
from vpr_lite_ros.image import Image, fit, thumbnail
from vpr_lite_ros.inference import Description, PlaceModel
from vpr_lite_ros.matching import (
    Camera,
    Status,
    count_planar,
    count_rigid,
    fit_epipolar,
    log_zoom,
    meeting_points,
    mutual_matches,
)
from vpr_lite_ros.metric_pose import View, measure_way
from vpr_lite_ros.refinement import find_again, refine_motion

AGREEMENT_WINDOW = 5
"""Matches of consecutive keyframes agree when they are at most this many stored ones apart."""
CLOCK_TOLERANCE_NS = 1_000_000_000
"""Images may come this much out of order; a stamp further back means that the clock was set."""
PLANAR_TOLERANCE_PX = 24.0
"""Of the network's input, a patch and a half: a homography explains less than a camera's motion."""
RIGID_TOLERANCE_PX = 0.5
"""Of the network's input: correlation finds points to a fraction of a pixel."""
MOST_THREADS = 4
"""Candidates that are checked at once. Python's own steps take turns: each more gains less."""
ZOOM_DISTANCE_PX = 60.0
"""Of the network's input: points nearer to each other than this tell no zoom."""


class LoopDetector:
    """Recognises places seen before. One image at a time, in the order they were taken.

    Parameters
    ----------
    config
        Thresholds; ``nan``, and -1 inliers, are replaced by what the model's bundle recommends.
    model, database
        Both belong to the caller, who closes the database.
    """

    def __init__(self, config: Config, model: PlaceModel, database: KeyframeDatabase) -> None:
        self.model, self.database = model, database
        self.configure(config)
        self.forget()

    def configure(self, config: Config) -> None:
        """Judge by the parameters of ``config`` from the next image on."""
        self.config = config
        recommended = self.model.bundle.card.get("thresholds", {})
        self.similarity_threshold = config.similarity_threshold
        if math.isnan(self.similarity_threshold):
            self.similarity_threshold = float(recommended.get("similarity", -1.0))
        self.match_threshold = config.match_threshold
        if math.isnan(self.match_threshold):
            self.match_threshold = float(recommended.get("match", 0.0))
        self.min_inliers = config.min_inliers
        if self.min_inliers < 0:
            self.min_inliers = int(recommended.get("inliers", 0))

    def forget(self) -> None:
        """Start anew: the next image is a keyframe, nothing before it agrees with it."""
        self._last_stamp_ns: int | None = None
        self._last_pose: Pose | None = None
        self._last_descriptor: NDArray[np.float32] | None = None
        self._before: list[Candidate] = []
        self._recognised: Keyframe | None = None
        self._last_closure_ns: int | None = None
        # What odometry said before cannot be compared with what it will say.
        self._comparable_from = self.database.last_id + 1

    def is_due(self, stamp_ns: int, pose: Pose | None) -> bool:
        """Whether an image taken now may be a keyframe, as far as time and odometry tell."""
        if self._last_stamp_ns is None:
            return True
        keyframe = self.config.keyframe
        if abs(stamp_ns - self._last_stamp_ns) < keyframe.min_interval_s * 1e9:
            return False
        if pose is None or self._last_pose is None:
            return True
        return (
            math.dist(pose.position, self._last_pose.position) >= keyframe.min_translation_m
            or _angle(pose, self._last_pose) >= keyframe.min_rotation_rad
        )

    def process(
        self,
        image: Image,
        stamp_ns: int,
        pose: Pose | None = None,
        camera: Camera | None = None,
        depth: Depth | None = None,
    ) -> Decision:
        """Look ``image`` up among the keyframes, judge what is found, and store it.

        A database that is only read (mode localization) stores nothing; all else is the same.

        Parameters
        ----------
        image
            RGB, (H, W, 3) uint8, any size.
        stamp_ns
            When it was taken, nanoseconds.
        pose
            Of the body in the odometry's frame at that time, if there is odometry.
        camera
            Intrinsics of the image, if calibrated; without them there is no epipolar check.
        depth
            (H, W) metres along the optical axis, in register with the image, of any size; 0 where
            not known. With it closures are measured in metres, those of later images, too.

        Raises
        ------
        ImageError
            If the image cannot be used.
        DatabaseError
            If the keyframes cannot be read. Of one that cannot be stored ``fault`` says why.
        """
        decision = Decision(stamp_ns)
        self._notice_jump(stamp_ns, decision)
        if not self.is_due(stamp_ns, pose):
            return decision
        description = self._describe(image, decision, depth)
        if pose is None and not self._shows_something_new(description):
            return decision

        decision.candidates = self._retrieve(description, stamp_ns, self.config.top_k, decision)
        self._compare_ways(decision.candidates, stamp_ns, pose)
        self._verify(description, camera, decision)
        decision.closure = self._accept(self._follow(decision.candidates), stamp_ns)
        self._measure(decision, description, camera)

        self._store(decision, description, pose, camera)
        decision.is_keyframe = True
        self._last_stamp_ns, self._last_pose = stamp_ns, pose
        self._last_descriptor = description.descriptor
        return decision

    def resume(self) -> None:
        """Go on as if the last keyframe of the database's running session had just been stored.

        Only which keyframes were about to agree is not known any more.
        """
        last = self.database.keyframe(self.database.last_id)
        self._last_stamp_ns, self._last_pose = last.stamp_ns, last.pose
        self._last_descriptor = self.database.descriptor(last.id)
        self._comparable_from = 0

    def query(
        self, image: Image, stamp_ns: int = 0, top_k: int = 0, camera: Camera | None = None
    ) -> Decision:
        """Which stored places ``image`` resembles; nothing is stored.

        ``stamp_ns`` 0 searches all keyframes, ``top_k`` 0 takes the configured number.
        Consecutive keyframes play no part: the best candidate that passes every other check is
        the closure.
        """
        decision = Decision(stamp_ns)
        description = self._describe(image, decision)
        decision.candidates = self._retrieve(
            description, stamp_ns, top_k or self.config.top_k, decision, any_time=stamp_ns == 0
        )
        self._verify(description, camera, decision)
        passed = [one for one in decision.candidates if one.status is Status.NOT_BEST]
        if passed:
            decision.closure = max(passed, key=sureness)
            decision.closure.status = Status.ACCEPTED
            self._measure(decision, description, camera)
        return decision

    def examine(
        self,
        description: Description,
        found: Sequence[tuple[int, float]],
        camera: Camera | None = None,
    ) -> list[Candidate]:
        """What the checks say of keyframes (id, similarity) that ``database.search`` has found.

        Nothing is accepted or stored.
        """
        decision = Decision(0, candidates=self._candidates(found))
        self._verify(description, camera, decision)
        return decision.candidates

    def _describe(
        self, image: Image, decision: Decision, depth: Depth | None = None
    ) -> Description:
        with _timed(decision, "resize"):
            fitted, picture = fit(image, self.model.bundle.image_size), thumbnail(image)
        with _timed(decision, "place"):
            description = replace(self.model.describe(fitted), picture=picture)
            if depth is not None:
                known = sample_depth(depth, description.centres)
                description = replace(description, depth=known)
        decision.description = description
        return description

    def _shows_something_new(self, description: Description) -> bool:
        """Without odometry, a picture much like the last keyframe's means: not moved."""
        if self._last_descriptor is None:
            return True
        # By rounding, the cosine of two equal pictures may exceed 1.
        whole, last = description.descriptor[0], self._last_descriptor[0]
        similarity = min(1.0, float(whole @ last))
        return similarity <= self.config.keyframe.max_similarity

    def _retrieve(
        self,
        description: Description,
        stamp_ns: int,
        top_k: int,
        decision: Decision,
        any_time: bool = False,
    ) -> list[Candidate]:
        """The most similar keyframes that are not too recent."""
        gap_ns = 0 if any_time else round(self.config.min_time_gap_s * 1e9)
        with _timed(decision, "search"):
            found = self.database.search(description.descriptor, top_k, stamp_ns, gap_ns)
            return self._candidates(found)

    def _candidates(self, found: Sequence[tuple[int, float]]) -> list[Candidate]:
        return [
            Candidate(self.database.keyframe(keyframe_id), similarity, rank)
            for rank, (keyframe_id, similarity) in enumerate(found)
        ]

    def _verify(self, description: Description, camera: Camera | None, decision: Decision) -> None:
        """Give each candidate that fails a check, by this image alone, its status."""
        for candidate in decision.candidates:
            candidate.status = self.judge(candidate)
        similar = [one for one in decision.candidates if one.status is Status.NOT_BEST]
        if not similar:
            return
        with _timed(decision, "match"):
            tokens = self.database.tokens([candidate.keyframe.id for candidate in similar])
            scores, assignments = self.model.match(description.tokens, tokens)
        with _timed(decision, "verify"):
            for candidate, score, assignment in zip(similar, scores, assignments, strict=True):
                candidate.match_score = float(score)
                candidate.matches = mutual_matches(assignment)
                candidate.points = meeting_points(
                    assignment,
                    candidate.matches,
                    description.centres,
                    candidate.keyframe.centres,
                    self.model.bundle.image_size,
                )
                candidate.status = self.judge(candidate)
            matched = [one for one in similar if one.status is Status.NOT_BEST]
            self._check(matched, description, camera)

    def _check(
        self, matched: Sequence[Candidate], description: Description, camera: Camera | None
    ) -> None:
        """Judge matched candidates by their geometry and their pictures, several at once."""
        pictures = [self._picture(candidate.keyframe) for candidate in matched]

        def check(candidate: Candidate, picture: bytes) -> None:
            self._check_geometry(candidate, description, camera)
            self._check_pictures(candidate, picture, description)
            self._weigh(candidate)

        threads = min(self.config.threads or os.cpu_count() or 1, MOST_THREADS)
        with ThreadPoolExecutor(threads, "check") as pool:  # OpenCV lets other threads run
            list(pool.map(check, matched, pictures))

    def _weigh(self, candidate: Candidate) -> None:
        """Judge a candidate by all that this image tells."""
        if (calibration := self.model.bundle.calibration) is not None:
            curve = calibration.curve(bool(candidate.has_camera))
            candidate.confidence_alone = curve.confidence(features_of(candidate))
            candidate.confidence = candidate.confidence_alone
        candidate.status = self.judge(candidate)

    def _check_geometry(
        self, candidate: Candidate, description: Description, camera: Camera | None
    ) -> None:
        """Which of the matches agree with each other, and whether the query was taken nearer."""
        assert candidate.matches is not None and candidate.points is not None
        query_centres = description.centres[candidate.matches.query]
        pixels = np.array(self.model.bundle.image_size)
        known_camera = candidate.keyframe.camera
        candidate.has_camera = camera is not None and known_camera is not None
        if camera is not None and known_camera is not None:
            candidate.fit = fit_epipolar(
                camera.rays(query_centres),
                known_camera.rays(candidate.points),
                self._tolerance(camera),
            )
            candidate.agreement = candidate.num_inliers
        else:
            candidate.agreement = count_planar(
                query_centres * pixels, candidate.points * pixels, PLANAR_TOLERANCE_PX
            )
        candidate.zoom = log_zoom(
            query_centres * pixels, candidate.points * pixels, ZOOM_DISTANCE_PX
        )

    def _check_pictures(
        self, candidate: Candidate, picture: bytes, description: Description
    ) -> None:
        """Which of the matches look alike pixel by pixel, and agree with each other.

        To a network two windows are alike; in pixels only one window is.
        """
        assert candidate.matches is not None and candidate.points is not None
        query_centres = description.centres[candidate.matches.query]
        pixels = np.array(self.model.bundle.image_size)
        points, found = find_again(description.picture, query_centres, picture, candidate.points)
        candidate.found_points, candidate.found = points, found
        candidate.num_correlated = count_rigid(
            query_centres[found] * pixels, points[found] * pixels, RIGID_TOLERANCE_PX
        )

    def _picture(self, keyframe: Keyframe) -> bytes:
        try:
            return self.database.thumbnail(keyframe.id)
        except DatabaseError:  # damaged: its tokens may be whole
            return b""

    def _tolerance(self, camera: Camera) -> float:
        """How far a match may lie from its epipolar line, as an angle."""
        angle = camera.radians_per_pixel(self.model.bundle.image_size[0])
        return self.config.epipolar_tolerance_px * angle

    def _measure(self, decision: Decision, description: Description, camera: Camera | None) -> None:
        """The way to the closure once more, by the pictures; in metres, where one has depth."""
        closure = decision.closure
        if closure is None or closure.fit is None:
            return
        keyframe, matches, found = closure.keyframe, closure.matches, closure.found
        assert matches is not None and found is not None, "there is an epipolar fit"
        assert closure.found_points is not None, "there is an epipolar fit"
        assert camera is not None and keyframe.camera is not None, "there is an epipolar fit"
        with _timed(decision, "refine"):
            tolerance = self._tolerance(camera)
            closure.refined = refine_motion(
                camera.rays(description.centres[matches.query[found]]),
                keyframe.camera.rays(closure.found_points[found]),
                tolerance,
            )
            query = _view(camera, description.picture, description, matches.query)
            match = _view(keyframe.camera, self._picture(keyframe), keyframe, matches.candidate)
            motion = closure.refined or closure.fit
            closure.metric = measure_way(query, match, motion, tolerance)

    def judge(self, candidate: Candidate) -> Status:
        """The first check that fails by what is known of a candidate so far, else NOT_BEST.

        What was not measured yet (NaN, None) fails no check.
        """
        if candidate.similarity < self.similarity_threshold:
            return Status.LOW_SIMILARITY
        if math.isnan(candidate.match_score):
            return Status.NOT_BEST
        if candidate.match_score < self.match_threshold:
            return Status.LOW_SCORE
        if candidate.num_matches < self.config.min_matches:
            return Status.FEW_MATCHES
        if candidate.has_camera and candidate.num_inliers < self.min_inliers:
            return Status.GEOMETRY
        odometry = self.config.odometry
        if candidate.apart_m > odometry.place_radius_m + odometry.max_drift * candidate.travelled_m:
            return Status.ODOMETRY
        calibration = self.model.bundle.calibration
        if calibration is not None and not math.isnan(candidate.confidence):
            curve = calibration.curve(bool(candidate.has_camera))
            if candidate.confidence < curve.threshold(self.config.target_precision):
                return Status.LOW_CONFIDENCE
        return Status.NOT_BEST

    def _notice_jump(self, stamp_ns: int, decision: Decision) -> None:
        """Stamps that go back begin a new session: a clock that was set, a bag that loops."""
        if self._last_stamp_ns is None or stamp_ns >= self._last_stamp_ns - CLOCK_TOLERANCE_NS:
            return
        self.forget()
        decision.new_session = self.database.begin_session(self.database.run)

    def _store(
        self,
        decision: Decision,
        description: Description,
        pose: Pose | None,
        camera: Camera | None,
    ) -> None:
        """Keep the keyframe, unless the database is only read; a full disk costs no closure."""
        if self.database.read_only:
            return
        with _timed(decision, "store"):
            try:
                decision.keyframe_id = self.database.add(
                    decision.stamp_ns, description, pose, camera
                )
            except DatabaseError as error:
                decision.fault = str(error)

    def _compare_ways(
        self, candidates: Sequence[Candidate], stamp_ns: int, pose: Pose | None
    ) -> None:
        """How far each candidate is from here by odometry, and by which way the robot came."""
        for candidate in candidates:
            keyframe = candidate.keyframe
            if pose is None or keyframe.pose is None or keyframe.id < self._comparable_from:
                continue
            travelled_m = self.database.travelled_since(keyframe.id, stamp_ns, pose)
            if math.isfinite(travelled_m):
                candidate.apart_m = math.dist(pose.position, keyframe.pose.position)
                candidate.travelled_m = travelled_m

    def decide(self, candidates: Sequence[Candidate], stamp_ns: int) -> Candidate | None:
        """Judge the next keyframe's candidates, all measured before, as ``process`` does.

        For trying thresholds on recorded scores: nothing is described, matched or stored.
        """
        for candidate in candidates:
            candidate.confidence = candidate.confidence_alone
            candidate.status = self.judge(candidate)
        return self._accept(self._follow(candidates), stamp_ns)

    def _follow(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Judge anew, with what the keyframe before said of the same stretch of the map.

        Returns the candidates that pass every check and to which enough keyframes in a row have
        pointed. Those that are only not sure enough yet count for the next keyframe, too.
        """
        plausible = [
            one for one in candidates if one.status in (Status.NOT_BEST, Status.LOW_CONFIDENCE)
        ]
        agreeing = []
        for candidate in plausible:
            near = [
                before
                for before in self._before
                if self.database.steps_between(before.keyframe, candidate.keyframe)
                <= AGREEMENT_WINDOW
            ]
            candidate.agreeing = 1 + max((before.agreeing for before in near), default=0)
            earlier = max((before.confidence for before in near), default=0.0)
            candidate.confidence = float(sequential(candidate.confidence_alone, earlier))
            candidate.status = self.judge(candidate)
            if candidate.status is not Status.NOT_BEST:
                continue
            if candidate.agreeing >= self.config.min_agreeing_keyframes:
                agreeing.append(candidate)
            else:
                candidate.status = Status.NOT_CONSISTENT
        self._before = plausible
        return agreeing

    def _accept(self, agreeing: list[Candidate], stamp_ns: int) -> Candidate | None:
        """The best candidate, if it is news."""
        recognised_before, self._recognised = self._recognised, None
        if not agreeing:
            return None
        best = max(agreeing, key=sureness)
        self._recognised = best.keyframe
        goes_on = (
            recognised_before is not None
            and self.database.steps_between(recognised_before, best.keyframe) <= AGREEMENT_WINDOW
        )
        if goes_on and self._last_closure_ns is not None:
            since_s = abs(stamp_ns - self._last_closure_ns) / 1e9
            if since_s < self.config.min_closure_interval_s:
                best.status = Status.TOO_SOON
                return None
        self._last_closure_ns = stamp_ns
        best.status = Status.ACCEPTED
        return best


def _view(
    camera: Camera, picture: bytes, image: Description | Keyframe, rows: NDArray[np.int64]
) -> View:
    depth = image.depth[rows] if image.depth is not None else None
    return View(camera, picture, image.centres[rows], depth)


def _angle(pose0: Pose, pose1: Pose) -> float:
    """Angle in radians between the orientations of two poses."""
    dot = sum(a * b for a, b in zip(pose0.quaternion, pose1.quaternion, strict=True))
    return 2 * math.acos(min(1.0, abs(dot)))


@contextmanager
def _timed(decision: Decision, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        decision.timings_ms[stage] = (time.perf_counter() - began) * 1e3
