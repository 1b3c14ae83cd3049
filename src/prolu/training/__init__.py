"""One SAE, trained step by step.

- `config`: the settings of a run, with their defaults and help; `config_checks`: what they must fulfil.
- `choices`: the names that settings choose from; `naming`: the names of runs and families.
- `trainer`: one training step: state in, state out.
- `trainer_stack`, `stack_speedups.json`: several SAEs trained in one step, and for which shapes that is faster.
- `trainer_state`: all that a step changes and a checkpoint holds.
- `mesh_parts`: one SAE split over the ranks of a mesh.
- `starting_weights`: the weights before the first step.
- `frozen_parts`: random baselines, whose encoder or decoder stays as it started.
- `nested_prefixes`: the prefixes of a nested loss in one update, given or drawn.
- `schedule`, `target_l0`: the learning rate, and the controller of the penalty's coefficient.
- `refitting`: decoder rows with the gains that reconstruct best, after training.
- `resampling`: dead latents, and how they are replaced.
- `dead_latents`: the latents that an auxiliary term revives.
- `moments`: Adam's two moments of every weight.
- `steps`: the arithmetic of a step, dense and sparse, on CPU and GPU.
"""
