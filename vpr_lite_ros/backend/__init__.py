"""A pose-graph back end: what loop closures are worth, and an example of how to use them.

It needs the extra ``pip install vpr_lite_ros[backend]``; the detector and its node do not.
"""
