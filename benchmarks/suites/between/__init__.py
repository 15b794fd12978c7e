"""What the suite `waypoint` sets up: callers and one called workload, each with its uProxy, and waypoints between.

`mesh` is what the control plane would be told, `standing` starts it, with ours and two Envoys as the waypoint.
"""
