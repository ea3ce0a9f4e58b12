# SPDX-License-Identifier: Apache-2.0
"""The supervisor's mind: what should run, what does run, and what to do about the difference.

In: events (a launch, a report of a worker, the passing of time). Out: effects for the supervisor
to carry out, snapshots to show, the routing table. Pure: no I/O, no await, no clock and no
randomness that is not an argument, so that a hundred thousand random histories can be run
through it.

It is level-triggered: `ClusterState.reconcile` compares the wish with the observation. Launch,
boot, crash, scale, cancel and terminate are the same few lines; an effect that gets lost is found
missing and made again. Only what something has happened to is compared, so that a report of one
worker costs the same in a cluster of one and of a thousand.

`cluster_state.py` takes events and reconciles; `world.py` has models, nodes and the indexes over
both; `observation.py` what workers say; `loads.py` how busy nodes are; `lifecycle.py` moves
replicas; `scaling.py` says how many there should be for the load, `room.py` who sleeps for whom;
`commands.py` says what a worker should do; `admission.py` refuses; `routes.py`,
`views.py` and `outcomes.py` are what others see.

What fences what: `LaunchId` an old launch from a new one of the same uid, `InstanceId` one start
of a process from the next, `WorkerEpoch` one life of a worker from the next, the supervisor's
epoch an old supervisor from this one.
"""
