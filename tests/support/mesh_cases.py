"""SAEs that are split over several processes in tests."""

from support.mesh_worker import BATCH, Case

REVIVED = {"aux_dead_tokens": 3 * BATCH, "resample_dead_below": 0.05}

CASES = [
    Case("prolu_ste", {"nonlinearity": "prolu_ste", "penalty": "sqrt_l1", "step": "dense"}),
    Case("sparse", {"nonlinearity": "prolu_relu", "penalty": "sqrt_l1", "step": "sparse"}),
    Case("sparse_torch", {"nonlinearity": "relu", "step": "sparse_torch", "max_grad_norm": 0.05}),
    Case("gated_dense", {"nonlinearity": "gated", "step": "dense"}),
    Case("gated", {"nonlinearity": "gated", "step": "sparse"}),
    Case("jumprelu", {"nonlinearity": "jumprelu", "penalty": "l0", "coeff": 0.001, "target_l0": 10.0}),
    Case(
        "quadratic",
        {"nonlinearity": "jumprelu", "penalty": "quadratic_l0", "target_l0": 10.0, "coeff": 0.1, "step": "dense"},
    ),
    Case("frequency", {"nonlinearity": "prolu_ste", "penalty": "frequency_tanh", "coeff": 0.001, "step": "sparse"}),
    Case(
        "frequency_torch", {"nonlinearity": "relu", "penalty": "frequency_tanh", "coeff": 0.001, "step": "sparse_torch"}
    ),
    Case("pre_activation", {"nonlinearity": "jumprelu_ste", "step": "dense", "coeff": 0.01} | REVIVED),
    Case("pre_activation_sparse", {"nonlinearity": "jumprelu_ste", "step": "sparse", "coeff": 0.01} | REVIVED),
    Case("topk", {"nonlinearity": "topk(7)", "penalty": "none"} | REVIVED),
    Case("batchtopk", {"nonlinearity": "batchtopk(7)", "penalty": "none"} | REVIVED),
    Case("clip", {"nonlinearity": "prolu_ste", "step": "dense", "max_grad_norm": 0.05}),
    Case("frozen", {"nonlinearity": "relu", "freeze": "decoder", "step": "sparse", "max_grad_norm": 0.05}),
    Case("soft", {"nonlinearity": "prolu_relu", "freeze": "soft_decoder", "step": "dense"}),
    Case("transcoder", {"nonlinearity": "gated", "step": "dense", "skip": True, "max_grad_norm": 0.05}, d_out=11),
    Case("transcoder_sparse", {"nonlinearity": "relu", "step": "sparse", "skip": True}, d_out=31),
    Case("transcoder_topk", {"nonlinearity": "topk(7)"} | REVIVED, d_out=31),
    Case("one_step", {"nonlinearity": "prolu_ste", "penalty": "sqrt_l1", "step": "sparse"}, "float32", 1),
    Case("one_dense_step", {"nonlinearity": "prolu_ste", "penalty": "sqrt_l1", "step": "dense"}, "float32", 1),
]
