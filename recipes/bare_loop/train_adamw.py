"""A bare loop with Accelerate: train_adamw.py and train.py differ in two lines, which are the optimizer."""

from itertools import chain, islice, repeat

from accelerate.utils import set_seed
from torch.optim import AdamW
from transformers import get_linear_schedule_with_warmup

from recipes.bare_loop import job


def main() -> None:
    """Train, print loss and rate on the way, and the test loss at the end."""
    options = job.options()
    accelerator = job.accelerator()
    set_seed(options.seed)
    loader, test = job.data(options.batch_size, options.seed)
    model = job.build_model(options.layers, options.width)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, options.steps * accelerator.num_processes)
    model, optimizer, loader, test, schedule = accelerator.prepare(model, optimizer, loader, test, schedule)
    for step, (rows,) in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps), 1):
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            mean = accelerator.gather(loss.detach()).mean().item()
            accelerator.print(f"step {step} loss {mean:.4f} rate {job.applied_rate(optimizer):.3g}", flush=True)
    accelerator.print(f"test loss {job.test_loss(accelerator, model, test):.4f}")
    model = accelerator.free_memory(model)  # before its process group: DistributedDataParallel may hang otherwise
    accelerator.end_training()


if __name__ == "__main__":
    main()
