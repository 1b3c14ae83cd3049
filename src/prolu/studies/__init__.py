"""Many SAEs on one stream of activations.

- `sweep`: the training loop, and `run_sweep`.
- `request`, `grids`, `widths`: what is asked for, lists of runs, and numbers of latents as multiples of d_in.
- `recipe`, `recipes`, `paper_sweeps`: what a study trains, the studies that have a name, and those of the paper.
- `study_in_training`, `run_in_training`: a study and a run while they train.
- `live_figures`: what a notebook shows of SAEs while they train.
- `progress`: how far the runs of a study are, read from its files while another process trains it.
- `settings`: how a sweep scores and saves its runs.
- `amounts`: how much text a study asks for, and how much there is.
- `preflight`: what is found out before a training begins.
- `extension`: whether a request fits what its folder holds, or extends it.
- `checkpoints`, `trackers`: their state on the disk, their curves in W&B and TensorBoard.
- `folder`, `results`, `runs`: the folder of a study, its finished runs, and one of them.
- `records`: checks of what is read of a study that may be a stranger's.
- `scored_study`: SAEs that were scored here and trained elsewhere.
- `added_figures`, `probing`: figures that are added to finished runs, such as those of probes.
- `cost`: what a study will cost; from the sizes of a language model (`model_sizes`) and this machine's `rates`.
- `groups`: runs dealt to several processes.
"""
