"""What every estimator of a chain's gradient must do; a test class inherits it and says which estimator it is."""

import copy
import importlib

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, FullBackprop, TruncatedBackprop
from implicit_diffusion.gradients.estimator import RowStates
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.chain_loops import Recorder
from tests.helpers.oracles import affine_chain
from tests.helpers.shared_runs import recorded, same_run
from tests.helpers.together import together

N, DIM, BATCH, BETA = 6, 2, 4, 0.5
STRIDES = [1, 4, *(pytest.param(stride, marks=pytest.mark.slow) for stride in (2, N))]  # of these 4 does not divide N
OTHERS = (Adjoint, FullBackprop, lambda: TruncatedBackprop(2))


def gamma(parameters):
    """Γ as one vector, zeros where there is no gradient."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def gammas(loop):
    """Γ of every update that a `Recorder` has made, as vectors."""
    return [torch.cat([g.flatten() for g in gradients]) for gradients in loop.update.optimizer.gradients]


def shared_runs(module, name, updates, loops):
    """Runs of loops that an estimator serves, with a batch that two and three processes can share."""
    case = getattr(importlib.import_module(module), name)()
    chosen = [case.loop(kind, Recorder, lr=0.02, batch=6, **options) for kind, options in case.loops[:loops]]
    return [recorded(loop, updates) for loop in chosen]


class EstimatorContract:
    """In nested loops, and by itself."""

    pretrained_rows = (5,)
    loops = ((Nested, {}),)

    def make(self):
        raise NotImplementedError

    def problem(self):
        """A chain away from its reference, and an objective with a running cost."""
        chain, reward = affine_chain(N, DIM, pretrained_rows=self.pretrained_rows)
        for p in chain.denoiser.parameters():
            p.data += 0.1 * Noise(8).normal(p.shape, p.numel(), dtype=p.dtype)
        return chain, Reward(reward) + BETA * PathKL()

    def gradient(self, chain, objective, index=0, estimator=None, before=0.0):
        parameters = list(chain.denoiser.parameters())
        for p in parameters:
            p.grad = torch.full_like(p, before)
        estimate = (estimator or self.make()).gradient(chain, objective, Noise(3), BATCH, index)
        return gamma(parameters), estimate

    def loop(self, kind=Nested, optimizer=torch.optim.Adam, lr=1e-2, estimator=None, **options):
        chain, objective = self.problem()
        update = Update(optimizer(chain.denoiser.parameters(), lr=lr), accumulate=options.pop("accumulate", 1))
        batch, estimator = options.pop("batch", BATCH), estimator or self.make()
        return kind(chain, objective, update, batch=batch, noise=Noise(3), estimator=estimator, **options)

    def test_the_gradient_is_added_to_what_is_there(self):
        chain, objective = self.problem()
        first, _ = self.gradient(chain, objective)
        added, _ = self.gradient(chain, objective, before=0.5)
        assert first.abs().max() > 0
        torch.testing.assert_close(added - 0.5, first, rtol=1e-12, atol=1e-12)

    def test_a_trajectory_is_addressed_by_its_number(self):
        chain, objective = self.problem()
        (first, _), (again, _), (other, _) = (self.gradient(chain, objective, index) for index in (0, 0, 1))
        assert torch.equal(first, again) and not torch.allclose(first, other)

    def test_values_are_those_of_the_trajectory(self):
        chain, objective = self.problem()
        _, (values, *_) = self.gradient(chain, objective)
        terms = {term.name: term for _, term in objective.terms}
        expected = {"reward": terms["reward"].value(chain.endpoint(chain.sample(Noise(3), BATCH), Noise(3)))}
        if "path_kl" in values:
            walk = chain.walk(chain.initial(Noise(3), BATCH), Noise(3), reference=True)
            expected["path_kl"] = sum(PathKL().cost(transition).mean() for transition, _, _ in walk)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert not value.requires_grad
            torch.testing.assert_close(value, expected[name].detach(), rtol=1e-12, atol=1e-12)

    def test_a_call_by_hand_returns_the_values(self):
        chain, objective = self.problem()
        expected, (values, *_) = self.gradient(chain, objective)
        chain.denoiser.zero_grad()
        assert self.make()(chain, objective, Noise(3), BATCH) == values
        assert torch.equal(gamma(list(chain.denoiser.parameters())), expected)

    @pytest.mark.usefixtures("as_users_run")
    def test_arguments_of_another_type_are_refused(self):
        chain, objective = self.problem()
        with pytest.raises(InvalidInputError, match="chain must be of type Chain"):
            self.make()(chain.denoiser, objective, Noise(3), BATCH)
        with pytest.raises(InvalidInputError, match="objective must be of type Objective"):
            self.make()(chain, chain, Noise(3), BATCH)

    def test_every_network_call_is_counted(self):
        chain, objective = self.problem()
        calls = []
        for network in (chain.denoiser, chain.reference):
            network.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
        _, (_, evaluations, _) = self.gradient(chain, objective)
        assert evaluations == sum(calls) > 0

    def test_its_check_accepts_what_it_can_do(self):
        chain, objective = self.problem()
        self.make().check(chain, objective, chain.endpoint(chain.sample(Noise(0), 2), Noise(0)))

    def test_rows_are_the_last_ones(self):
        chain, _ = self.problem()
        rows = self.make().rows(chain)
        assert len(rows) and rows == range(N)[rows.start :]

    def test_a_prediction_of_memory_leaves_no_trace(self):
        loop = self.loop()
        state = copy.deepcopy(loop.state_dict())
        need = loop.estimator.memory(loop.chain, loop.objective, loop.noise)
        assert min(need.carry, need.pull + need.held) >= 0 and need.pull + need.held + need.turn > 0
        assert predict_memory(loop).activations == BATCH * (need.held + max(need.pull, need.turn))
        assert all(p.grad is None for p in loop.model.parameters())
        assert str(loop.state_dict()) == str(state)

    def test_loops_continue_states_of_the_same_estimator_alone(self):
        loop = self.loop()
        loop.step()
        for make in OTHERS:
            other = self.loop(estimator=make())
            if other.estimator.name == loop.estimator.name:
                continue
            with pytest.raises(InvalidInputError, match=r"estimator was .*, is "):
                other.load_state_dict(loop.state_dict())

    def test_a_nested_loop_continues_bit_for_bit(self):
        self.continues({}, Nested, 9, 4)

    def continues(self, options, kind, steps, at):
        whole, first, second = (self.loop(kind, **options) for _ in range(3))
        for _ in range(steps):
            expected = whole.step()
        for _ in range(at):
            first.step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(steps - at):
            metrics = second.step()
        assert metrics == expected
        for a, b in zip(whole.model.parameters(), second.model.parameters()):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        ("W", "updates", "loops"),
        [(3, 2, 2), *(pytest.param(W, 4, None, marks=pytest.mark.slow) for W in (2, 3))],
    )
    def test_several_processes_compute_what_one_does(self, W, updates, loops):
        case = type(self).__module__, type(self).__qualname__, updates, loops
        alone = shared_runs(*case)
        for *each, one in zip(*together(W, "tests.gradients.contract:shared_runs", *case), alone, strict=True):
            same_run(each, one)

    def nested_gradients(self, loop, count):
        """Γ of the first trajectories, one by one, by one estimator."""
        estimator = self.make()
        return [self.gradient(loop.chain, loop.objective, index, estimator)[0] for index in range(count)]


class RowEstimatorContract(EstimatorContract):
    """In queues too, whose contributions must add up to the nested gradients."""

    loops = ((Nested, {}), *((Queue, {"stride": stride}) for stride in (1, 2, N)))

    def test_what_a_call_measures_is_a_number_per_slot_and_zero_where_nothing_is_trained(self, monkeypatch):
        loop, calls = self.loop(Queue), []
        pull = loop.estimator.pull

        def watched(chain, objective, at, carry):
            calls.append((at.rows, pull(chain, objective, at, carry)))
            return calls[-1][1]

        monkeypatch.setattr(loop.estimator, "pull", watched)
        for _ in range(2 * N):
            loop.step()
        assert any(len(rows) > 1 for rows, _ in calls)
        for rows, pulled in calls:
            for numbers in pulled.measured.values():
                assert numbers.shape == (len(rows),)
                assert not numbers[[row in self.pretrained_rows for row in rows]].any()

    @pytest.mark.parametrize("stride", STRIDES)
    def test_without_learning_a_queue_adds_up_to_the_nested_gradients(self, stride):
        loop = self.loop(Queue, Recorder, lr=0.0, stride=stride)
        assert len(list(loop.run(11))) == 11
        assert not loop.slots  # the run drained: no trajectory was wasted
        total, nested = sum(gammas(loop)), self.nested_gradients(loop, loop.injected)
        torch.testing.assert_close(total, sum(nested), rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("stride", STRIDES)
    def test_with_learning_a_contribution_is_a_replay_under_the_recorded_history(self, stride):
        """Each trajectory by itself, row by row, under the θ that it met; its pulls sorted by update."""
        loop = self.loop(Queue, Recorder, lr=0.02, stride=stride)
        chain, parameters = loop.chain, list(loop.model.parameters())
        thetas, update_of = [], []  # θ in force during each iteration; index of its update, None where none
        while loop.update.updates < 12:
            thetas.append([p.detach().clone() for p in parameters])
            before = loop.update.updates
            loop.step()
            update_of.append(before if loop.update.updates > before else None)
        expected = [torch.zeros_like(g) for g in gammas(loop)]

        def put_back(iteration):
            for p, value in zip(parameters, thetas[iteration]):
                p.data.copy_(value)
                p.grad = None

        estimator = self.make()
        for index in range(loop.injected):
            table, states = loop._timetable_of(index), {0: chain.initial(loop.noise, BATCH, index)[None]}
            for stage in range(min(table.length, len(thetas) - index)):  # one trajectory is injected per iteration
                put_back(index + stage)
                with torch.no_grad():
                    for row in table.forward(stage):
                        xi = chain.innovation(loop.noise, BATCH, [index], [row])
                        states[row + 1] = chain.transition(states[row], [row]).push(xi)
                if stage == table.flight - 1:
                    carry, _ = estimator.turn(loop.objective, chain.endpoint(states[N][0], loop.noise, index))
                    carry = {name: part[None] for name, part in carry.items()}
                for row in table.backward(stage):
                    at = RowStates(states[row], [row], [index], loop.noise)
                    carry = estimator.pull(chain, loop.objective, at, carry).carry
                if update_of[index + stage] is not None:
                    expected[update_of[index + stage]] += gamma(parameters)
        for ours, theirs in zip(gammas(loop), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)

    def test_a_queue_of_stride_n_is_the_nested_loop(self):
        nested, queue = self.loop(Nested, Recorder), self.loop(Queue, Recorder, stride=N)
        for _ in zip(nested.run(5), queue.run(5), strict=True):
            pass
        for ours, theirs in zip(gammas(nested), gammas(queue), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        assert nested.cost() == queue.cost()

    @pytest.mark.parametrize("stride", [1, 4])
    def test_a_queue_continues_bit_for_bit(self, stride):
        self.continues({"stride": stride}, Queue, 17, 8)

    @pytest.mark.parametrize("stride", [*STRIDES, *(pytest.param(s, marks=pytest.mark.slow) for s in (3, 5))])
    def test_a_queue_holds_what_its_timetable_predicts(self, stride):
        class Counted(Queue):
            fullest = 0

            def _pull(self, call):
                tensors = [x for slot in self.slots for x in (*slot.states.values(), *slot.carry.values())]
                self.fullest = max(self.fullest, sum(x.nbytes for x in tensors))
                return super()._pull(call)

        loop = self.loop(Counted, stride=stride)
        for _ in loop.run(3 * N):
            pass
        assert 0 < loop.fullest <= predict_memory(loop).states
        if {slot.rows for slot in map(loop._timetable_of, range(loop.injected))} == {loop.timetable.rows}:
            assert loop.fullest == predict_memory(loop).states

    def test_several_slots_in_one_call_are_each_by_itself(self):
        chain, objective = self.problem()
        estimator, rows, parameters = self.make(), [4, 2, 3], list(chain.denoiser.parameters())
        x = Noise(5).normal((3, BATCH, DIM), dtype=torch.float64)
        carries = [estimator.turn(objective, chain.endpoint(end, Noise(3), i))[0] for i, end in enumerate(x + 1)]
        carry = {name: torch.stack([each[name] for each in carries]) for name in carries[0]}
        chain.denoiser.zero_grad()
        together = estimator.pull(chain, objective, RowStates(x, rows, [0, 1, 2], Noise(3)), carry)
        total = gamma(parameters)
        chain.denoiser.zero_grad()
        evaluations = 0
        for slot, row in enumerate(rows):
            at = RowStates(x[slot : slot + 1], [row], [slot], Noise(3))
            alone = estimator.pull(chain, objective, at, {name: part[None] for name, part in carries[slot].items()})
            evaluations += alone.evaluations
            for name, part in alone.carry.items():
                torch.testing.assert_close(together.carry[name][slot], part[0], rtol=1e-12, atol=1e-12)
            for name, cost in alone.costs.items():
                torch.testing.assert_close(together.costs[name][slot], cost[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, gamma(parameters), rtol=1e-12, atol=1e-12)
        assert evaluations == together.evaluations

    def test_it_carries_what_it_says(self):
        chain, objective = self.problem()
        carry, _ = self.make().turn(objective, chain.endpoint(chain.sample(Noise(3), BATCH), Noise(3)))
        need = self.make().memory(chain, objective, Noise(3))
        assert sum(part.nbytes for part in carry.values()) == BATCH * need.carry
