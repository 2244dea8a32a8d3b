"""The rules in transformers' PyTorch code, on the CPU: (o, state) and gradients as NumPy arrays."""

from __future__ import annotations

import pytest

GATED_DELTA = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def gated_delta(name, inputs, to):
    """(results, gradients) of [q, k, v, g, beta, state] by the function of that name.

    to weighs (o, state) in the number whose gradients are taken.
    """
    torch = pytest.importorskip("torch")
    qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

    def op(q, k, v, g, beta, state):
        o, final = getattr(qwen3_next, name)(
            q * q.shape[-1] ** 0.5,  # it scales q by Dk^-0.5; ours takes q as given
            k,
            v,
            g,
            beta,
            initial_state=state.swapaxes(2, 3),  # there [B, Hv, Dk, Dv]
            output_final_state=True,
        )
        return o, final.swapaxes(2, 3)

    return _run(torch, op, inputs, to)


def mamba2(inputs, to, dt_limits, chunk_size=32):
    """(results, gradients) of [q, k, v, dt, A_log, dt_bias, D, state], by its Mamba-2 path.

    dt is raw: bias, softplus, limits and the skip D are as its mixer applies them.
    """
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")

    def op(q, k, v, dt, A_log, dt_bias, D, state):
        return module.mamba2_chunk_scan(
            v,
            dt,
            -torch.exp(A_log),
            k,
            q,
            chunk_size=chunk_size,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limits,
            initial_states=state,
            return_final_states=True,
        )

    return _run(torch, op, inputs, to)


def _run(torch, op, inputs, to):
    tensors = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in inputs]
    results = op(*tensors)
    weighed = zip(results, to, strict=True)
    sum((x * torch.tensor(w, dtype=torch.float32)).sum() for x, w in weighed).backward()
    return [x.detach().numpy() for x in results], [x.grad.numpy() for x in tensors]
