"""The ROS 2 node: callbacks convert, a worker runs the detector, results are published.

A managed node: *configured* it has a model and a database, *active* it listens to the camera.
The executor's thread only takes messages. One worker thread does the work; when images come
faster than it can take them, the newest wins and the others are counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter as RosParameter
from std_srvs.srv import SetBool, Trigger

from vpr_lite_ros import messages, node_parameters
from vpr_lite_ros.config import ConfigError
from vpr_lite_ros.database import DatabaseError, KeyframeDatabase, open_database
from vpr_lite_ros.detector import LoopDetector
from vpr_lite_ros.health import Severity
from vpr_lite_ros.image import ImageError, decode_message
from vpr_lite_ros.inference import (
    DEFAULT_BUNDLE,
    BackendError,
    BundleError,
    PlaceModel,
    open_model,
)
from vpr_lite_ros.msg import Keyframe as KeyframeMessage
from vpr_lite_ros.node_inputs import AnyImage, Inputs
from vpr_lite_ros.node_outputs import Outputs
from vpr_lite_ros.node_process import run_node
from vpr_lite_ros.srv import GetLoopClosures, QueryImage
from vpr_lite_ros.tally import Tally, resident_mb
from vpr_lite_ros.worker import Worker

Transition = TransitionCallbackReturn


@dataclass(frozen=True)
class Opened:
    """What a configured node holds."""

    model: PlaceModel
    database: KeyframeDatabase
    detector: LoopDetector
    outputs: Outputs


class LoopClosureNode(LifecycleNode):
    """Images in, loop closures out."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__(
            "loop_closure", automatically_declare_parameters_from_overrides=True, **node_options
        )
        self.config = node_parameters.declare(self)
        self.add_on_set_parameters_callback(self._change_parameters)
        self._opened: Opened | None = None
        self._inputs: Inputs | None = None
        self._worker: Worker[AnyImage] | None = None
        # Guards detector and database: the worker holds it for an image, a service for a call.
        self._detector_lock = threading.Lock()
        self._paused = False
        self.tally = Tally()
        self._said: set[str] = set()
        self._while_configured: list[Any] = []
        # With use_sim_time, ROS time stands still until a bag plays; timers must not wait for it.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._diagnostics_topic = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._publish_diagnostics, clock=self._steady)

    @property
    def opened(self) -> Opened:
        """Model, database and detector of a configured node."""
        assert self._opened is not None, "services and worker exist only while configured"
        return self._opened

    # -- lifecycle (executor's thread) ---------------------------------------------------------

    def autostart(self) -> bool:
        """As the parameter says: ``start``, or wait for a lifecycle manager."""
        return self.start() if self.config.autostart else True

    def start(self) -> bool:
        """Configure and activate at once; False if that failed, for the reason that was logged."""
        return (
            self.trigger_configure() is Transition.SUCCESS
            and self.trigger_activate() is Transition.SUCCESS
        )

    def on_configure(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Open model and database, offer topics and services."""
        try:
            self._opened = self._open()
        except (BundleError, BackendError, DatabaseError) as error:
            self.tally.failed(str(error))
            self.get_logger().fatal(str(error))
            return Transition.FAILURE
        self._offer_services(self._opened)
        model, database = self._opened.model, self._opened.database
        self.get_logger().info(
            f"model {model.bundle.model_id} on {model.backend}; database "
            f"{self.config.database_path or '(temporary)'} holds {len(database)} keyframes; "
            f"session {database.session}"
        )
        return Transition.SUCCESS

    def on_activate(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Listen to camera, depth and odometry."""
        self.opened.detector.forget()
        self._worker = Worker(self._work, "detector")
        self._inputs = Inputs(
            self, self.config, self._steady, self.tally, self._take, self._say_once
        )
        return Transition.SUCCESS

    def on_deactivate(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Finish the image in hand and write the database; keep everything."""
        self._stop_listening()
        try:
            with self._detector_lock:
                self.opened.database.save()
        except DatabaseError as error:
            self.tally.failed(str(error))
            self.get_logger().error(str(error))
        return Transition.SUCCESS

    def on_cleanup(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Let go of model, database, topics and services."""
        self._close()
        return Transition.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """From any state: finish the image in hand, write the database, let everything go."""
        if self._worker is not None:
            self.on_deactivate(state)
        self._close()
        return Transition.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition that failed half-way ends as a node that is not configured."""
        self.get_logger().error("a transition failed: the node is not configured now")
        return self.on_shutdown(state)

    def destroy_node(self) -> None:
        """Shut down, if nobody has, then leave the graph."""
        if self._opened is not None:
            self.trigger_shutdown()
        super().destroy_node()

    def _open(self) -> Opened:
        session = self.config.session_id or f"{datetime.now(timezone.utc):%Y-%m-%dT%H-%M-%SZ}"
        model = open_model(
            Path(self.config.bundle) if self.config.bundle else DEFAULT_BUNDLE,
            self.config.backend,
            self.config.threads,
            most_candidates=self.config.top_k,
            behind=True,
        )
        database = open_database(self.config, model.bundle, session)
        outputs = Outputs(
            self,
            self.config,
            model.bundle,
            database,
            self._detector_lock,
            self.tally,
            self._say_once,
        )
        return Opened(model, database, LoopDetector(self.config, model, database), outputs)

    def _close(self) -> None:
        for thing in self._while_configured:
            # Services and a subscription: a node has one method for each.
            self.destroy_service(thing) or self.destroy_subscription(thing)
        self._while_configured.clear()
        if self._opened is not None:
            self._opened.outputs.close()
            with self._detector_lock:
                self._opened.database.close()
            self._opened = None

    def _offer_services(self, opened: Opened) -> None:
        self._while_configured += [
            self.create_service(Trigger, "~/save", self._save),
            self.create_service(Trigger, "~/reset", self._reset),
            self.create_service(SetBool, "~/pause", self._pause),
            self.create_service(QueryImage, "~/query_image", self._query_image),
            self.create_service(GetLoopClosures, "~/get_loop_closures", self._get_loop_closures),
        ]
        if not opened.database.read_only:
            self._while_configured.append(
                self.create_subscription(
                    KeyframeMessage, "other_keyframes", self._on_other_keyframe, 10
                )
            )

    def _take(self, message: AnyImage) -> None:
        """An image has come."""
        if self._paused:
            self.tally.count("dropped: paused")
        elif self._worker is not None and self._worker.give(message):
            self.tally.count("dropped: busy")

    def _stop_listening(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        # The image in hand still needs what the inputs know.
        if self._worker is not None:
            self._worker.stop()
        self._inputs = self._worker = None

    def _change_parameters(self, requested: Sequence[RosParameter]) -> SetParametersResult:
        """All that were asked for at once, or none and why."""
        try:
            config = node_parameters.changed(self, requested, self._opened is not None)
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if config is not None:
            self.config = config
            if self._opened is not None:
                with self._detector_lock:
                    self._opened.detector.configure(config)
        return SetParametersResult(successful=True)

    # -- the work (worker thread) --------------------------------------------------------------

    def _work(self, message: AnyImage) -> None:
        try:
            self._process(message)
        except ImageError as error:
            self._drop(error.cause, f"image dropped, {error}")
        except DatabaseError as error:
            self._drop("database", str(error))
        except Exception as error:  # one bad image must not end a week's run
            self._drop("error", f"image dropped, {type(error).__name__}: {error}")

    def _process(self, message: AnyImage) -> None:
        began = time.perf_counter()
        detector, inputs = self.opened.detector, self._inputs
        assert inputs is not None, "the worker stops before the inputs go"
        stamp_ns = messages.stamp_ns(message.header.stamp)
        if stamp_ns == 0:
            raise ImageError("zero stamp", "the camera's driver must fill in header.stamp")
        pose = inputs.pose_at(stamp_ns)
        if not detector.is_due(stamp_ns, pose):
            return
        image = decode_message(message)
        inputs.look_at(image)
        decoded = time.perf_counter()
        depth = inputs.depth_of(message.header, image)
        depth_ms = (time.perf_counter() - decoded) * 1e3
        with self._detector_lock:
            decision = detector.process(image, stamp_ns, pose, inputs.camera, depth)
        if decision.new_session:
            self.get_logger().warning(
                f"stamps went back to {stamp_ns / 1e9:.3f} s: a bag that loops, a clock that was "
                f"set? Session {decision.new_session} begins"
            )
        if decision.fault:
            self._drop("not stored", decision.fault)
        if not decision.is_keyframe:
            return
        latency_ms = (time.perf_counter() - began) * 1e3
        decode_ms = (decoded - began) * 1e3
        self.tally.took(
            {"decode": decode_ms, "depth": depth_ms, **decision.timings_ms, "latency": latency_ms}
        )
        self.opened.outputs.publish(
            decision,
            message.header,
            image,
            camera=inputs.camera,
            odometry_frame=inputs.odometry_frame,
            latency_ms=latency_ms,
        )

    def _on_other_keyframe(self, message: KeyframeMessage) -> None:
        """Store another robot's keyframe (executor's thread)."""
        opened = self.opened
        if message.robot_id == self.config.robot_id:
            if message.session != opened.database.session:
                self._say_once(
                    "robot_id",
                    f"keyframes of another robot come with this one's robot_id {message.robot_id} "
                    "and are not used: give each robot a robot_id of its own",
                )
            return  # one topic for all robots brings one's own back
        bundle = opened.model.bundle
        try:
            description, camera = messages.from_keyframe(message, bundle)
            with self._detector_lock:
                opened.database.add(
                    messages.stamp_ns(message.header.stamp),
                    description,
                    camera=camera,
                    robot_id=message.robot_id,
                    session=message.session,
                )
            self.tally.count("other robots' keyframes")
        except (ValueError, DatabaseError) as error:
            self.tally.count("dropped: other robots' keyframes")
            self.tally.failed(str(error))
            self._say_once("other keyframe", f"a keyframe of another robot is not used: {error}")

    # -- services (executor's thread) ----------------------------------------------------------

    def _save(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            with self._detector_lock:
                self.opened.database.save()
            response.success = True
            response.message = (
                f"{len(self.opened.database)} keyframes are in {self._database_name()}"
            )
        except DatabaseError as error:
            response.message = str(error)
        return response

    def _reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            with self._detector_lock:
                before = len(self.opened.database)
                self.opened.database.reset()
                self.opened.detector.forget()
                self.opened.outputs.closures.clear()
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
                decision = self.opened.detector.query(
                    image,
                    messages.stamp_ns(request.image.header.stamp),
                    request.top_k,
                    self._inputs.camera if self._inputs else None,
                )
        except (ImageError, DatabaseError) as error:
            response.message = str(error)
            return response
        response.success = True
        if decision.candidates:
            latency_ms = (time.perf_counter() - began) * 1e3
            frame = request.image.header.frame_id
            response.candidates = self.opened.outputs.to_messages(decision, frame, latency_ms)
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
            for closure in list(self.opened.outputs.closures)
            if messages.stamp_ns(closure.header.stamp) >= since
        ]
        response.success = True
        response.message = f"{len(response.closures)} closures"
        return response

    def _database_name(self) -> str:
        return self.config.database_path or "a temporary database, gone when the node ends"

    # -- saying what goes on -------------------------------------------------------------------

    def _drop(self, cause: str, text: str) -> None:
        self.tally.count(f"dropped: {cause}")
        self.tally.failed(text)
        self._say_once(cause, f"{text} (said once; further ones are counted in /diagnostics)")

    def _say_once(self, cause: str, text: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            self.get_logger().warning(text)

    def _publish_diagnostics(self) -> None:
        values: dict[str, object] = {"state": "not configured", **self.tally.values()}
        level, text = Severity.OK, "not configured"
        if self._opened is not None:
            values |= self._describe_opened(self._opened)
            text = "running" if self._worker is not None else "not active"
            values["state"] = text
        findings = []
        if self._inputs is not None:
            findings = self._inputs.findings()
            silent = any(one.name == "silence" for one in findings)
            values["rate_hz"] = "0.0" if silent else f"{self._inputs.rate_hz:.1f}"
        values |= {f"images: {one.name}": f"{one.seen}. {one.remedy}" for one in findings}
        if self._worker is not None and self._paused:
            text = "paused"
        elif trouble := self._trouble():
            level, text = Severity.WARNING, trouble
        elif findings:
            level, text = findings[0].severity, f"{findings[0].seen}. {findings[0].remedy}"
        self._diagnostics_topic.publish(
            messages.to_diagnostics(
                self.get_clock().now().to_msg(),
                self.get_fully_qualified_name().lstrip("/"),
                int(level),
                text,
                values,
            )
        )

    def _describe_opened(self, opened: Opened) -> dict[str, object]:
        database = opened.database
        return {
            "backend": opened.model.backend,
            "model_id": opened.model.bundle.model_id,
            "database": self._database_name(),
            "database_mb_on_disk": f"{database.bytes_on_disk / 2**20:.1f}",
            "database_mb_in_ram": f"{database.bytes_in_memory / 2**20:.1f}",
            "durable_keyframe": database.durable_id,
            "process_mb_in_ram": f"{resident_mb():.0f}",
            "session": database.session,
            "keyframes": len(database),
            "closures": len(opened.outputs.closures),
            "camera_info": "known" if self._inputs and self._inputs.camera else "none",
        }

    def _trouble(self) -> str:
        """What a person beside the robot should look at first; empty if all is well."""
        if self._inputs is not None and self._inputs.trouble:
            return self._inputs.trouble
        if self._opened is not None:
            fault = self._opened.model.fault or self._opened.database.fault
            if fault:
                return fault
        return self.tally.recent_error


def main(args: list[str] | None = None) -> int:
    """Run the node until Ctrl-C or SIGTERM. Returns the process's exit code."""
    return run_node(LoopClosureNode, LoopClosureNode.autostart, "loop_closure", args)


if __name__ == "__main__":
    sys.exit(main())
