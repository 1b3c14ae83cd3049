"""The runs of one study dealt to several processes, and gathered into one folder again.

- `engine`: the command-line options that choose the processes.
- `dealing`: runs dealt into groups, and gathered.
- `worker`: the task that a worker receives, runs and reports on.
- `ray_cluster`: groups as tasks of a Ray cluster.
"""
