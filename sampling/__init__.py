"""The maths of inference: noise paths, schedules and samplers in plain torch, one paper in one file."""
