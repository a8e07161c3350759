"""Training under masks on the GPU: the CPU's gradients, by every way in which people train there."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tiny
import turnover
from problems import CPU, IDS, ROWS, error, gradients, images, on_both, perceptron, texts, weights
from turnover import Batch, MaskSpec
from turnover.influence.gradients import mask_gradients
from turnover.influence.linear import LinearScorer

HALVES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest gradient, where forward and backward compute in half precision."""
every_problem = pytest.mark.parametrize("make", [perceptron, images, texts])
IDS = IDS[:ROWS]


def backward(network, batch, ids=IDS, *, run=None, hidden=False):
    """Gradients of a step's loss, on the CPU."""
    network.model.zero_grad()
    with network.hidden(ids) if hidden else network.exposed(ids):
        outputs = batch.call(network.model if run is None else run)
    functional.cross_entropy(tiny.logits(outputs).float(), batch.labels).backward()
    return gradients(network.model)


@every_problem
@pytest.mark.parametrize("hidden", [False, True])
def test_gradients(device, make, hidden):
    here, there = (backward(*one, hidden=hidden) for one in on_both(make, device))
    assert error(there, here) < 1e-4


def test_a_whole_training(device):
    def trained(network, batch):
        tiny.train(
            network, batch.inputs, batch.labels, IDS, epochs=30, rate=0.05, make=torch.optim.SGD
        )
        return weights(network.model)

    here, there = (trained(*one) for one in on_both(perceptron, device))
    assert error(there, here) < 1e-3


@every_problem
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_and_scaled_gradients(device, make, dtype):
    (plain, here), (network, there) = on_both(make, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(network.model.parameters(), 0.01)
    with network.exposed(IDS), torch.autocast(device.type, dtype):
        logits = tiny.logits(there.call(network.model))
        loss = functional.cross_entropy(logits.float(), there.labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert error(gradients(network.model), backward(plain, here)) < HALVES[dtype]
    before = weights(network.model)
    scaler.step(optimizer)
    scaler.update()
    after = weights(network.model)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


def test_units_that_an_instance_does_not_have_get_no_gradient_under_autocast(device):
    network, batch = on_both(perceptron, device)[1]
    one = batch.rows(0, 1)
    with network.exposed([7]), torch.autocast(device.type, torch.bfloat16):
        functional.cross_entropy(one.call(network.model).float(), one.labels).backward()
    kept = network.spec.exposed([7], "1", 64)[0]
    received = network.model[0].weight.grad.abs().sum(dim=1).cpu() > 0
    assert not received[~kept].any() and received[kept].any()


@pytest.mark.parametrize("make", [perceptron, images])
def test_compiled_steps_have_one_graph_and_are_not_compiled_again(device, make):
    network, batch = on_both(make, device)[1]
    network.model.train(make is perceptron)  # ordinary dropout would differ between two runs
    triton = device.type == "cuda" and find_spec("triton")
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if triton else "aot_eager"
    compiled = torch.compile(network.model, fullgraph=True, backend=backend)
    for start in range(2):
        for hidden in (False, True):
            backward(network, batch, IDS + start, run=compiled, hidden=hidden)
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for start in range(10, 14):
            for hidden in (False, True):
                found = backward(network, batch, IDS + start, run=compiled, hidden=hidden)
                expected = backward(network, batch, IDS + start, hidden=hidden)
                assert error(found, expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self, model, *, reentrant):
        super().__init__()
        self.first, self.rest, self.reentrant = model[:2], model[2:], reentrant

    def forward(self, inputs):
        if self.reentrant is None:
            return self.rest(self.first(inputs))
        return checkpoint(self.rest, self.first(inputs), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_masks_of_its_forward(device, reentrant):
    """In a backward of two forwards; it runs in a thread of its own on a GPU."""

    def found(device, reentrant):
        model = Checkpointed(tiny.randomise(tiny.mlp(64)), reentrant=reentrant).to(device)
        network = turnover.attach(model, "mlp", MaskSpec())
        inputs = tiny.features(ROWS).to(device)
        with network.exposed(IDS):
            loss = model(inputs).square().mean()
        with network.hidden(IDS + 1):
            loss = loss + model(inputs).square().mean()
        loss.backward()
        return gradients(model)

    expected = found(CPU, None)
    assert error(found(device, None), expected) < 1e-4
    assert error(found(device, reentrant), expected) < 1e-4


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step that a CUDA graph replays; on the CPU the step itself."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # makes tables, which a graph could not copy to the card
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("make", [perceptron, images])
def test_replayed_cuda_graphs_make_the_masks_of_new_ids(device, make):
    (eager, batch), (network, _) = on_both(make, device)
    eager.model.to(device).train(make is perceptron)
    network.model.train(make is perceptron)
    batch = batch.to(device)
    ids, sides = IDS.to(device), torch.zeros(ROWS, dtype=torch.bool, device=device)
    inputs, labels = batch.inputs.clone(), batch.labels.clone()

    def step_of(network):
        optimizer = torch.optim.SGD(network.model.parameters(), 1e-3)

        def step():
            optimizer.zero_grad()
            with network.bind(ids, sides):
                loss = functional.cross_entropy(network.model(inputs), labels)
            loss.backward()
            optimizer.step()

        return step

    plain = step_of(eager)
    start = copy.deepcopy(eager.model.state_dict())
    replay = captured(step_of(network), device)
    network.model.load_state_dict(start)  # the steps before the capture changed it
    for batch_number in range(4):
        before = weights(network.model)
        ids.copy_(IDS + 1000 * batch_number)
        sides.copy_(torch.arange(ROWS) % 4 == batch_number)
        inputs.copy_(batch.inputs.roll(batch_number, 0))
        replay()
        plain()
        change, expected = weights(network.model) - before, weights(eager.model) - before
        assert error(change, expected) < 1e-3


def test_convolutions_with_channels_last(device):
    (plain, batch), (network, there) = on_both(images, device)
    network.model.to(memory_format=torch.channels_last)
    inputs = there.inputs.to(memory_format=torch.channels_last)
    seen = []
    hook = network.model.features[6].register_forward_hook(lambda *given: seen.append(given[2]))
    found = backward(network, Batch(inputs, there.labels))
    hook.remove()
    assert error(found, backward(plain, batch)) < 1e-4
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def stream_of(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def test_several_streams_and_threads(device):
    """Each forward has the masks of the context that its thread opened on its stream."""
    network, batch = on_both(perceptron, device)[1]

    @torch.no_grad()
    def outputs(number):
        with network.exposed(IDS + number):
            return batch.call(network.model)

    expected = [outputs(number).cpu() for number in range(16)]
    synchronize(device)
    found, contexts = {}, [stream_of(device) for _ in range(4)]
    for number in range(16):
        with contexts[number % 4]:
            found[number] = outputs(number)
    synchronize(device)
    for number, one in found.items():
        torch.testing.assert_close(one.cpu(), expected[number], rtol=1e-5, atol=1e-5)

    def in_thread(numbers):
        with stream_of(device):
            for number in numbers:
                found[number] = outputs(number)

    found.clear()
    threads = [threading.Thread(target=in_thread, args=(range(i, 16, 2),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    synchronize(device)
    assert len(found) == 16
    for number, one in found.items():
        torch.testing.assert_close(one.cpu(), expected[number], rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def no_waiting(device: torch.device):
    """Any wait for the GPU raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_noticed(card):
    one = torch.ones(1, device=card)
    with no_waiting(card), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


@every_problem
@pytest.mark.parametrize("ids", ["pageable", "pinned", "on the device"])
def test_a_training_step_does_not_wait(device, make, ids):
    network, batch = on_both(make, device)[1]
    # transformers itself asks whether an attention mask holds any padding.
    if isinstance(batch.inputs, dict):
        batch = Batch({"input_ids": batch.inputs["input_ids"]}, batch.labels)
    given = IDS.to(device) if ids == "on the device" else IDS.clone()
    if ids == "pinned" and device.type == "cuda":
        given = given.pin_memory()
    sides = torch.arange(ROWS).to(given.device) % 2 == 0
    trained = [p for p in network.model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.0, fused=True)

    def step():
        for side in (network.exposed(given), network.hidden(given), network.bind(given, sides)):
            with side:
                logits = tiny.logits(batch.call(network.model))
            optimizer.zero_grad()
            functional.cross_entropy(logits, batch.labels).backward()
            optimizer.step()

    step()  # makes tables, and the optimizer's state
    before = weights(network.model)
    with no_waiting(device):
        step()
    assert not torch.equal(weights(network.model), before)


@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_linear_scores_do_not_wait(device, keep):
    network, batch = on_both(perceptron, device, keep=keep)[1]
    ids = torch.arange(5000, device=device)
    found = mask_gradients(network, turnover.objectives.margin, batch)
    scorer = LinearScorer(found, network.spec, network.known_units())
    expected = scorer.scores(ids)
    with no_waiting(device):
        again = scorer.scores(ids)
    assert torch.equal(again, expected)


def test_two_processes_that_share_a_card(device, tmp_path):
    """By gloo, as nccl refuses two processes on one card."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is without gloo")
    import two_processes

    program = Path(two_processes.__file__)
    path = os.pathsep.join(filter(None, [str(program.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, str(program), str(device), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [one.wait(timeout=120) for one in running] == [0, 0]
    finally:
        for one in running:
            one.kill()
    network, model = two_processes.build(device)
    two_processes.train(network, model, device)
    expected = weights(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert error(found, expected) < 1e-4
