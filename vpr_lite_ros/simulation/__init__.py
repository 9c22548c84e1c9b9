"""A robot's camera on a two-lap drive through a town that exists only here.

The demo and the tests need a drive with revisits, exact poses and pictures rich enough for a
network trained on photographs, without downloading one. It is drawn from a seed:

- `drive.py` takes the camera round twice, by day and in the evening, as `route.py` says;
- `town.py` lays out streets, houses, cars and trees;
- `houses.py`, `materials.py`, `things.py` and `land.py` paint them in the light of `light.py`;
- `view.py` draws what a pinhole camera sees of it all.
"""

from vpr_lite_ros.simulation.drive import Drive, OdometrySample, SimulatedFrame, simulate_drive

__all__ = ["Drive", "OdometrySample", "SimulatedFrame", "simulate_drive"]
