"""Visual place recognition and loop closure (kept empty: ROS 2 generates its own copy)."""
