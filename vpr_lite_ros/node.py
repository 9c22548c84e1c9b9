"""The ROS 2 node: callbacks convert, a worker runs the detector, results are published.

The executor's thread only takes messages. One worker thread does the work; when images come
faster than it can take them, the newest wins and the others are counted.
"""

from __future__ import annotations

import bisect
import signal
import sys
import threading
import time
from collections import Counter, deque
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from std_srvs.srv import SetBool, Trigger
from visualization_msgs.msg import MarkerArray

from vpr_lite_ros import messages
from vpr_lite_ros.config import Config, ConfigError, describe, make_config, parameters
from vpr_lite_ros.database import DatabaseError, Pose, open_database
from vpr_lite_ros.detector import Decision, LoopDetector
from vpr_lite_ros.image import Image, ImageError, decode_message, draw_matches
from vpr_lite_ros.inference import DEFAULT_BUNDLE, BackendError, BundleError, open_model
from vpr_lite_ros.matching import Camera
from vpr_lite_ros.msg import LoopClosure
from vpr_lite_ros.srv import GetLoopClosures, QueryImage

ODOMETRY_TOLERANCE_NS = 200_000_000
"""An odometry pose this far from an image's stamp is not the image's."""
CLOSURES_KEPT = 10_000
"""Closures that ``~/get_loop_closures`` remembers."""
LATENCIES_KEPT = 1000
GRAPH_PERIOD_S = 0.25
"""How often to look whether publishers of images have come, and what QoS they offer."""
RCLPY_PARAMETERS = ("use_sim_time", "start_type_description_service")
"""Every node has these; rclpy declares them itself."""


class LoopClosureNode(Node):
    """Images in, loop closures out."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__(
            "loop_closure", automatically_declare_parameters_from_overrides=True, **node_options
        )
        self.config = self._declare_parameters()
        session = self.config.session_id or f"{datetime.now(timezone.utc):%Y-%m-%dT%H-%M-%SZ}"
        bundle = Path(self.config.bundle) if self.config.bundle else DEFAULT_BUNDLE
        self.model = open_model(
            bundle,
            self.config.backend,
            self.config.threads,
            most_candidates=self.config.top_k,
            behind=True,
        )
        self.database = open_database(self.config, self.model.bundle, session)
        self.detector = LoopDetector(self.config, self.model, self.database)
        self.get_logger().info(
            f"model {self.model.bundle.model_id} on {self.model.backend}; database "
            f"{self.config.database_path or '(temporary)'} holds {len(self.database)} keyframes; "
            f"session {session}"
        )

        # Guards detector and database: the worker holds it for an image, a service for a call.
        self._detector_lock = threading.Lock()
        # Guards what the executor's thread and the worker share besides that.
        self._wakes_worker = threading.Condition()
        self._waiting: ImageMessage | CompressedImage | None = None
        self._stopping = False
        self._paused = False
        self._camera: Camera | None = None
        self._odometry: deque[tuple[int, Pose]] = deque(maxlen=1000)
        self._odometry_frame = "odom"
        self._optical_in_body: dict[str, NDArray[np.float64]] = {}
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._last_error = ""
        self._latencies_ms: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._closures: deque[LoopClosure] = deque(maxlen=CLOSURES_KEPT)

        self._tf_buffer = self._listen_to_tf()
        self._make_topics()
        self._worker = threading.Thread(target=self._work, name="detector")
        self._worker.start()

    # -- setting up ----------------------------------------------------------------------------

    def _declare_parameters(self) -> Config:
        """Declare what ``config.py`` lists, with descriptions and bounds; refuse anything else."""
        overrides: dict[str, Any] = {
            name: self.get_parameter(name).value
            for name in self.get_parameters_by_prefix("")
            if name not in RCLPY_PARAMETERS and not name.startswith("qos_overrides.")
        }
        config = make_config(overrides)
        for name, parameter in parameters().items():
            value = parameter.check(overrides.get(name, parameter.default))
            descriptor = ParameterDescriptor(description=describe(parameter), read_only=True)
            if parameter.minimum is not None and parameter.maximum is not None:
                low, high = parameter.minimum, parameter.maximum
                if parameter.type is int:
                    descriptor.integer_range = [
                        IntegerRange(from_value=int(low), to_value=int(high), step=1)
                    ]
                elif value == value:  # a range cannot hold nan, which means: as recommended
                    descriptor.floating_point_range = [
                        FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)
                    ]
            if self.has_parameter(name):
                self.undeclare_parameter(name)
            self.declare_parameter(name, value, descriptor, ignore_override=True)
        return config

    def _listen_to_tf(self) -> Any:
        """A tf2 buffer where tf2_ros is installed, else None."""
        try:
            import tf2_ros
        except ImportError:
            return None
        buffer = tf2_ros.Buffer()
        self._tf_listener = tf2_ros.TransformListener(buffer, self)
        return buffer

    def _make_topics(self) -> None:
        self._image_subscription: Subscription | None = None
        self._image_reliability: ReliabilityPolicy | None = None
        self._subscribe_to_images()
        # With use_sim_time, ROS time stands still until a bag plays; these must not wait for it.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(GRAPH_PERIOD_S, self._subscribe_to_images, clock=steady)
        self.create_subscription(
            CameraInfo, "camera_info", self._on_camera_info, qos_profile_sensor_data
        )
        # Odometry comes fast and must not be lost while an image is being taken.
        self.create_subscription(
            Odometry,
            "odom",
            self._on_odometry,
            QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT),
        )

        # A back end that joins late still gets what was found before, if it asks for it.
        latched = QoSProfile(
            depth=1000,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        self._closure_topic = self.create_publisher(LoopClosure, "loop_closures", latched)
        self._decision_topic = self.create_publisher(LoopClosure, "~/decisions", latched)
        self._match_image_topic = self.create_publisher(ImageMessage, "~/match_image", 10)
        self._marker_topic = self.create_publisher(MarkerArray, "~/markers", 1)
        self._diagnostics_topic = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._publish_diagnostics, clock=steady)

        self.create_service(Trigger, "~/save", self._save)
        self.create_service(Trigger, "~/reset", self._reset)
        self.create_service(SetBool, "~/pause", self._pause)
        self.create_service(QueryImage, "~/query_image", self._query_image)
        self.create_service(GetLoopClosures, "~/get_loop_closures", self._get_loop_closures)

    def _subscribe_to_images(self) -> None:
        """Subscribe as ``qos.image`` says, and anew when publishers come whose QoS asks for it."""
        compressed = self.config.image_transport == "compressed"
        topic = "image/compressed" if compressed else "image"
        wanted = self.config.qos.image
        if wanted == "auto":
            publishers = self.get_publishers_info_by_topic(self.resolve_topic_name(topic))
            if not publishers:
                return
            offered = {publisher.qos_profile.reliability for publisher in publishers}
            wanted = "reliable" if offered == {ReliabilityPolicy.RELIABLE} else "best_effort"
        reliability = ReliabilityPolicy[wanted.upper()]
        if reliability == self._image_reliability:
            return
        if self._image_subscription is not None:
            self.destroy_subscription(self._image_subscription)
        self._image_subscription = self.create_subscription(
            CompressedImage if compressed else ImageMessage,
            topic,
            self._on_image,
            # Deep enough that images are dropped, and counted, here and not by the middleware.
            QoSProfile(depth=10, reliability=reliability),
        )
        self._image_reliability = reliability
        self.get_logger().info(f"listening to {self.resolve_topic_name(topic)}, {wanted}")

    # -- what comes in (executor's thread) -----------------------------------------------------

    def _on_image(self, message: ImageMessage | CompressedImage) -> None:
        self._counts["images"] += 1
        if self._paused:
            self._counts["dropped: paused"] += 1
            return
        with self._wakes_worker:
            if self._waiting is not None:
                self._counts["dropped: busy"] += 1
            self._waiting = message
            self._wakes_worker.notify()

    def _on_camera_info(self, message: CameraInfo) -> None:
        try:
            self._camera = messages.to_camera(message)
        except ValueError as error:
            self._say_once("camera_info", f"camera_info is not used, no epipolar check: {error}")

    def _on_odometry(self, message: Odometry) -> None:
        try:
            pose = messages.to_pose(message)
        except ValueError as error:
            self._say_once("odometry", f"an odometry message is not used: {error}")
            return
        stamp = messages.stamp_ns(message.header.stamp)
        self._counts["odometry"] += 1
        with self._wakes_worker:
            if self._odometry and stamp <= self._odometry[-1][0]:
                self._odometry.clear()  # a bag that loops, a clock that was set
            self._odometry.append((stamp, pose))
            self._odometry_frame = message.header.frame_id or "odom"

    # -- the work (worker thread) --------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._wakes_worker:
                self._wakes_worker.wait_for(lambda: self._stopping or self._waiting is not None)
                if self._stopping:
                    return
                message, self._waiting = self._waiting, None
            assert message is not None
            try:
                self._process(message)
            except ImageError as error:
                self._drop(error.cause, f"image dropped, {error}")
            except DatabaseError as error:
                self._drop("database", str(error))
            except Exception as error:  # one bad image must not end a week's run
                self._drop("error", f"image dropped, {type(error).__name__}: {error}")

    def _process(self, message: ImageMessage | CompressedImage) -> None:
        began = time.perf_counter()
        stamp_ns = messages.stamp_ns(message.header.stamp)
        if stamp_ns == 0:
            raise ImageError("zero stamp", "the camera's driver must fill in header.stamp")
        pose = self._pose_at(stamp_ns)
        if not self.detector.is_due(stamp_ns, pose):
            return
        image = decode_message(message)
        with self._detector_lock:
            decision = self.detector.process(image, stamp_ns, pose, self._camera)
        if decision.keyframe_id is None:
            return
        latency_ms = (time.perf_counter() - began) * 1e3
        self._latencies_ms.append(latency_ms)
        self._publish(decision, message.header.frame_id, latency_ms, image)

    def _pose_at(self, stamp_ns: int) -> Pose | None:
        """The odometry pose nearest in time, if one is near enough."""
        with self._wakes_worker:
            poses = list(self._odometry)
        after = bisect.bisect_left(poses, stamp_ns, key=lambda item: item[0])
        near = poses[max(0, after - 1) : after + 1]
        if not near:
            return None
        stamp, pose = min(near, key=lambda item: abs(item[0] - stamp_ns))
        return pose if abs(stamp - stamp_ns) <= ODOMETRY_TOLERANCE_NS else None

    def _to_messages(
        self, decision: Decision, camera_frame: str, latency_ms: float
    ) -> list[LoopClosure]:
        return messages.to_messages(
            decision,
            frame_id=self.config.body_frame,
            session=self.database.session,
            robot_id=self.config.robot_id,
            model_id=self.model.bundle.model_id,
            latency_ms=latency_ms,
            optical_in_body=self._camera_rotation(camera_frame),
        )

    def _publish(
        self, decision: Decision, camera_frame: str, latency_ms: float, image: Image
    ) -> None:
        outgoing = self._to_messages(decision, camera_frame, latency_ms)
        for message in outgoing:
            self._decision_topic.publish(message)
        closure = decision.closure
        if closure is not None:
            self._closures.append(outgoing[0])
            self._closure_topic.publish(outgoing[0])
            if self._match_image_topic.get_subscription_count():
                self._publish_match_image(decision, image)
        if self._marker_topic.get_subscription_count():
            with self._detector_lock:
                poses = self.database.poses()
            self._marker_topic.publish(
                messages.to_markers(
                    self._odometry_frame, poses, self.database.session, list(self._closures)
                )
            )

    def _publish_match_image(self, decision: Decision, image: Image) -> None:
        closure = decision.closure
        assert closure is not None and closure.matches is not None
        assert decision.centres is not None
        with self._detector_lock:
            keyframe = self.database.thumbnail(closure.keyframe.id)
        picture = draw_matches(
            image,
            keyframe,
            decision.centres[closure.matches.query],
            closure.keyframe.centres[closure.matches.candidate],
            closure.fit.inliers if closure.fit else None,
        )
        message = ImageMessage(
            height=picture.shape[0],
            width=picture.shape[1],
            encoding="rgb8",
            step=picture.shape[1] * 3,
            data=picture.tobytes(),
        )
        message.header.stamp = messages.to_time(decision.stamp_ns)
        self._match_image_topic.publish(message)

    def _camera_rotation(self, camera_frame: str) -> NDArray[np.float64]:
        """Rotation of the camera's optical frame in the body's frame, from tf if it is there."""
        if camera_frame in self._optical_in_body:
            return self._optical_in_body[camera_frame]
        if self._tf_buffer is not None:
            try:
                found = self._tf_buffer.lookup_transform(
                    self.config.body_frame, camera_frame, rclpy.time.Time()
                )
                rotation = messages.rotation_matrix(found.transform.rotation)
                self._optical_in_body[camera_frame] = rotation
                return rotation
            except Exception:  # tf2's exceptions share no base class with a public name
                pass
        self._say_once(
            "tf",
            f"no transform from {self.config.body_frame} to {camera_frame!r} on tf: relative "
            "poses take the camera to look forward, upright",
        )
        return messages.OPTICAL_IN_BODY

    # -- services (executor's thread) ----------------------------------------------------------

    def _save(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            with self._detector_lock:
                self.database.save()
            response.success = True
            response.message = f"{len(self.database)} keyframes are in {self._database_name()}"
        except DatabaseError as error:
            response.message = str(error)
        return response

    def _reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            with self._detector_lock:
                before = len(self.database)
                self.database.reset()
                self.detector.forget()
                self._closures.clear()
            response.success = True
            response.message = f"{before} keyframes deleted from {self._database_name()}"
        except DatabaseError as error:
            response.message = str(error)
        return response

    def _pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._paused = request.data
        response.success = True
        response.message = "paused: images are dropped" if request.data else "running"
        return response

    def _query_image(
        self, request: QueryImage.Request, response: QueryImage.Response
    ) -> QueryImage.Response:
        began = time.perf_counter()
        try:
            image = decode_message(request.image)
            with self._detector_lock:
                decision = self.detector.query(
                    image,
                    messages.stamp_ns(request.image.header.stamp),
                    request.top_k,
                    self._camera,
                )
        except (ImageError, DatabaseError) as error:
            response.message = str(error)
            return response
        response.success = True
        if decision.candidates:
            latency_ms = (time.perf_counter() - began) * 1e3
            frame = request.image.header.frame_id
            response.candidates = self._to_messages(decision, frame, latency_ms)
            response.message = (
                "recognised" if decision.closure else "no stored keyframe passes every check"
            )
        else:
            response.message = "the database has no keyframe to compare with"
        return response

    def _get_loop_closures(
        self, request: GetLoopClosures.Request, response: GetLoopClosures.Response
    ) -> GetLoopClosures.Response:
        since = messages.stamp_ns(request.since)
        response.closures = [
            closure
            for closure in list(self._closures)
            if messages.stamp_ns(closure.header.stamp) >= since
        ]
        response.success = True
        response.message = f"{len(response.closures)} closures"
        return response

    def _database_name(self) -> str:
        return self.config.database_path or "a temporary database, gone when the node ends"

    # -- saying what goes on -------------------------------------------------------------------

    def _drop(self, cause: str, text: str) -> None:
        self._counts[f"dropped: {cause}"] += 1
        self._last_error = text
        self._say_once(cause, f"{text} (said once; further ones are counted in /diagnostics)")

    def _say_once(self, cause: str, text: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            self.get_logger().warning(text)

    def _publish_diagnostics(self) -> None:
        latencies = np.array(self._latencies_ms or [np.nan])
        values: dict[str, object] = {
            "backend": self.model.backend,
            "model_id": self.model.bundle.model_id,
            "database": self._database_name(),
            "session": self.database.session,
            "keyframes": len(self.database),
            "closures": len(self._closures),
            "latency_ms_p50": f"{np.percentile(latencies, 50):.1f}",
            "latency_ms_p95": f"{np.percentile(latencies, 95):.1f}",
            "images": 0,
            "odometry": 0,
            **dict(sorted(self._counts.items())),
            "last_error": self._last_error,
        }
        level, text = DiagnosticStatus.OK, "running"
        if self._paused:
            text = "paused"
        elif not self._counts["images"]:
            level, text = DiagnosticStatus.WARN, "no image has arrived yet"
        elif fault := self.model.fault or self._last_error:
            level, text = DiagnosticStatus.WARN, fault
        self._diagnostics_topic.publish(
            messages.to_diagnostics(
                self.get_clock().now().to_msg(),
                self.get_fully_qualified_name().lstrip("/"),
                int.from_bytes(level, "little"),
                text,
                values,
            )
        )

    def destroy_node(self) -> None:
        """Finish the image in hand, write the database, then go."""
        with self._wakes_worker:
            self._stopping = True
            self._wakes_worker.notify()
        self._worker.join()
        try:
            self.database.save()
        except DatabaseError as error:
            self.get_logger().error(str(error))
        self.database.close()
        super().destroy_node()


def main(args: list[str] | None = None) -> int:
    """Run the node until Ctrl-C or SIGTERM. Returns the process's exit code."""
    # Ctrl-C is handled here, not by rclpy: the worker may still publish while the node ends.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: stop.set())
    try:
        node = LoopClosureNode()
    except (ConfigError, BundleError, BackendError, DatabaseError) as error:
        rclpy.logging.get_logger("loop_closure").fatal(str(error))
        rclpy.shutdown()
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        pass
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
