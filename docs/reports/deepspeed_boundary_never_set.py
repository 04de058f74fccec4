"""Several backward() calls in one optimizer step, ZeRO 1 or 2 with the optimizer on the CPU, no boundary set.

    pip install torch deepspeed
    python deepspeed_boundary_never_set.py [--stage 2] [--no-offload] [--set-boundary] [--unmanaged]

The loss is a dot product of the weights with a constant, so the gradient of backward number k is that constant: 10**k
at every place. Plain SGD with learning rate 1 then shows in the digits of the update which of them arrived. Needs no
GPU: one process, the CPU accelerator, gloo.
"""

# pyright: reportMissingImports=false

import argparse
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29517")

import deepspeed  # noqa: E402
import torch  # noqa: E402

BACKWARDS, STEPS, SIZE = 4, 3, 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--no-offload", action="store_true")
    parser.add_argument("--set-boundary", action="store_true", help="call set_gradient_accumulation_boundary")
    parser.add_argument("--unmanaged", action="store_true", help="managed_gradient_accumulation false")
    args = parser.parse_args()

    # Replaces an operator for inference on CPUs that training does not use; building it takes minutes.
    vars(deepspeed.comm.torch)["build_shm_op"] = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = torch.nn.Linear(SIZE, 1, bias=False)
    zero = {"stage": args.stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    if not args.no_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if args.unmanaged:
        config["managed_gradient_accumulation"] = False
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    due = sum(10.0**k for k in range(BACKWARDS))
    print(f"deepspeed {deepspeed.__version__}, stage {args.stage}, offload {not args.no_offload}, due: {due:.0f}")
    wrong = False
    for step in range(STEPS):
        before = weight(engine)
        for k in range(BACKWARDS):
            if args.set_boundary:
                engine.set_gradient_accumulation_boundary(is_boundary=k == BACKWARDS - 1)
            engine.backward(engine(torch.full((1, SIZE), 10.0**k)).sum())
        engine.step()
        update = float((before - weight(engine)).mean())
        wrong |= abs(update - due) > 0.5
        print(f"step {step + 1}: gradient applied {update:.0f}{'' if abs(update - due) < 0.5 else '   <- wrong'}")
    raise SystemExit(int(wrong))


def weight(engine) -> torch.Tensor:
    """The weights, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(engine.module.weight).detach().double().clone()


if __name__ == "__main__":
    main()
