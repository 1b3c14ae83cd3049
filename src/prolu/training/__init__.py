"""One SAE, trained step by step.

- `config`, `config_checks`: what a run is asked to be, and whether its values have the right types.
- `starting_weights`: where its weights begin.
- `schedule`, `target_l0`: its learning rate, and the controller of its penalty's coefficient.
- `trainer`: one training step: state in, state out.
- `resampling`: dead latents, and how they are replaced.
- `steps`: the arithmetic of a step, dense and sparse, on CPU and GPU.
"""
