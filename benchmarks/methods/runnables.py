"""Agents as LangChain runs them: runnables over `ChatCoupled`, each frozen model an ensemble of one.

The specialist's answer travels to the anchor as text, in one hand-over or in several turns. The same class runs the
coupled ensemble, so that all of them pay for the same machinery.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from rc_agents.adapters.langchain import ChatCoupled
from rc_agents.benchmarks import files
from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.coupled import coupled
from rc_agents.benchmarks.methods.lora import lora as tuned
from rc_agents.benchmarks.methods.search import known_search, search_file
from rc_agents.benchmarks.tasks.agents import Ask, lookups
from torch import Tensor

import rc_agents
from rc_agents.scoring import Cost, Likelihood, Loss

Build = Callable[[int], Runnable[Any, str]]
"""From the most tokens of an answer to what answers `{"question": ...}`."""

TOLD_TOKENS = 24
READ = {
    "expert": "An expert was asked: {question}\nThe expert said: {told}\n\nNow answer: {question}",
    "note": "Note: {told}\n\n{question}",
    "repeat": "{question}\nThe right answer is: {told}\nRepeat the right answer.",
}
CRITIQUE = "{question}\nSomeone answered: {draft}\nIs that right? Give the right answer."
REVISE = "{question}\nYour first answer: {draft}\nAn expert says: {verdict}\nGive the final answer."
ROUTE = (
    "Which expert should answer? Say only one word: {names} or none.\nQuestion: {question}\nExpert:"
)
VALIDATED = 6  # questions that choose among prompts


class Counter(BaseCallbackHandler):
    """Counts calls and tokens of every model in a chain."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        """One more call."""
        self.cost.calls += 1

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        """Adds what it read and wrote."""
        usage = response.generations[0][0].message.usage_metadata or {}
        self.cost.prompt_tokens += usage.get("input_tokens", 0)
        self.cost.completion_tokens += usage.get("output_tokens", 0)


class RunnableScorer:
    """Answers the `Scorer` protocol's questions by a runnable, one after another, streamed.

    Args:
        build: the runnable.
        trained_parameters: for the cost.
    """

    def __init__(self, build: Build, trained_parameters: int = 0) -> None:
        self.build = build
        self._cost = Cost(trained_parameters=trained_parameters)

    @property
    def cost(self) -> Cost:
        """What answering has cost so far, for all models."""
        return self._cost

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, *, first_line: bool = False
    ) -> list[str]:
        """Greedy answers."""
        chain = self.build(max_new_tokens)
        answers = []
        with self.cost.timed():
            for prompt in prompts:
                begun, first, pieces = time.perf_counter(), 0.0, []
                config: Any = {"callbacks": [Counter(self.cost)]}
                for piece in chain.stream({"question": prompt}, config=config):
                    first = first or time.perf_counter() - begun
                    pieces.append(piece)
                self.cost.first_token_seconds += first or time.perf_counter() - begun
                answers.append("".join(pieces))
        return answers

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Agents that talk give no likelihoods."""
        raise NotApplicable("agents answer in text and give no likelihoods")

    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """Nor these."""
        raise NotApplicable("agents answer in text and give no likelihoods")

    def nll(self, texts: Sequence[str], max_length: int = 128) -> list[tuple[float, int]]:
        """Nor these."""
        raise NotApplicable("agents answer in text and give no likelihoods")

    def rolling_nll(self, texts: Sequence[str], window: int = 256, stride: int = 128) -> list[Loss]:
        """Nor these."""
        raise NotApplicable("agents answer in text and give no likelihoods")


def alone(model: Any, tokenizer: Any) -> Any:
    """Returns a frozen model as an ensemble of one."""
    return rc_agents.couple(model, {}, tokenizers={"anchor": tokenizer})


def chat(model: Any, tokens: int) -> Runnable[Any, str]:
    """Returns a model that answers messages with text."""
    return ChatCoupled(model=model, max_tokens=tokens, temperature=0.0) | StrOutputParser()


def say(model: Any, prompt: str, tokens: int) -> Runnable[Any, str]:
    """Returns a model that answers a prompt with fields."""
    return ChatPromptTemplate.from_messages([("user", prompt)]) | chat(model, tokens)


def asks(model: Any) -> Build:
    """A model that is asked the question as it stands."""
    return lambda tokens: say(model, "{question}", tokens)


def parts(bench: Bench) -> tuple[Any, dict[str, Any]]:
    """Returns the anchor and the specialists, each an ensemble of one."""
    models, tokenizers = bench.frozen.models, bench.frozen.tokenizers
    each = {name: alone(model, tokenizers[name]) for name, model in models.items()}
    return each.pop("anchor"), each


def agent_anchor(bench: Bench) -> Fitted:
    """The frozen anchor by itself."""
    return Fitted(scorer=RunnableScorer(asks(parts(bench)[0])))


def agent_specialist(bench: Bench) -> Fitted:
    """The first specialist by itself."""
    return Fitted(scorer=RunnableScorer(asks(next(iter(parts(bench)[1].values())))))


def agent_coupled(bench: Bench) -> Fitted:
    """The ensemble, in one pass."""
    if bench.setting.ensemble is None:
        fitted = coupled(bench)
        model, count = fitted.model, fitted.parameters
    else:
        model = rc_agents.CoupledForCausalLM.from_pretrained(
            bench.setting.ensemble, device_map=bench.device
        )
        count = sum(value.numel() for _, value in model.trainable_parameters())
    return Fitted(scorer=RunnableScorer(asks(model), count), parameters=count, model=model)


def agent_lora(bench: Bench) -> Fitted:
    """LoRA on the anchor, trained on what the ensemble's bridges have seen."""
    fitted = tuned(bench)
    model = alone(fitted.model.merge_and_unload(), bench.tokenizer)
    return Fitted(
        scorer=RunnableScorer(asks(model), fitted.parameters),
        parameters=fitted.parameters,
        steps=fitted.steps,
        search=fitted.search,
        seconds=fitted.seconds,
        notes=fitted.notes,
    )


def agent_handoff(bench: Bench) -> Fitted:
    """Two agents, one hand-over: the first specialist answers, the anchor reads that and answers."""
    anchor, others = parts(bench)
    first = next(iter(others.values()))

    def build(read: str) -> Build:
        return lambda tokens: (
            RunnablePassthrough.assign(told=say(first, "{question}", TOLD_TOKENS))
            | say(anchor, read, tokens)
        )

    return chosen(bench, {name: build(read) for name, read in READ.items()}, turns=2)


def agent_three(bench: Bench) -> Fitted:
    """Three agents: both specialists answer, the anchor reads both."""
    anchor, others = parts(bench)
    if len(others) < 2:
        raise NotApplicable("the setting has one specialist")

    def build(read: str) -> Build:
        told = {name: say(one, "{question}", TOLD_TOKENS) for name, one in others.items()}
        both = " / ".join(f"{{{name}}}" for name in others)
        return lambda tokens: (
            RunnablePassthrough.assign(**told) | say(anchor, read.replace("{told}", both), tokens)
        )

    return chosen(bench, {name: build(read) for name, read in READ.items()}, turns=3)


def agent_critique(bench: Bench) -> Fitted:
    """Several turns: the anchor drafts, the specialist criticises, the anchor revises, the specialist speaks again.

    The anchor then gives the final answer: five model calls.
    """
    anchor, others = parts(bench)
    first = next(iter(others.values()))

    def build(read: str) -> Build:
        return lambda tokens: (
            RunnablePassthrough.assign(draft=say(anchor, "{question}", TOLD_TOKENS))
            | RunnablePassthrough.assign(verdict=say(first, CRITIQUE, TOLD_TOKENS))
            | RunnablePassthrough.assign(draft=say(anchor, REVISE, TOLD_TOKENS))
            | RunnablePassthrough.assign(told=say(first, "{question}", TOLD_TOKENS))
            | say(anchor, read, tokens)
        )

    return chosen(bench, {name: build(read) for name, read in READ.items()}, turns=5)


def agent_routed(bench: Bench) -> Fitted:
    """The anchor names an expert, who answers and whom the anchor reads; with no expert it answers itself."""
    anchor, others = parts(bench)
    names = ", ".join(others)

    def build(read: str) -> Build:
        route = say(anchor, ROUTE.replace("{names}", names), 4)

        def go_on(tokens: int) -> Callable[[Mapping[str, Any]], Any]:
            def chain(inputs: Mapping[str, Any]) -> Any:
                word = inputs["route"].casefold()
                name = next((one for one in others if one.casefold() in word), None)
                if name is None:
                    return say(anchor, "{question}", tokens)
                told = say(others[name], "{question}", TOLD_TOKENS)
                return RunnablePassthrough.assign(told=told) | say(anchor, read, tokens)

            return chain

        return lambda tokens: (
            RunnablePassthrough.assign(route=route) | RunnableLambda(go_on(tokens))
        )

    return chosen(bench, {name: build(read) for name, read in READ.items()}, turns=3)


def chosen(bench: Bench, builds: Mapping[str, Build], turns: int) -> Fitted:
    """Returns the chain whose prompt works best on validation questions, with the search on record."""
    begun, file = time.perf_counter(), search_file(bench, list(READ.values()))
    tried = known_search(file)
    asked = [] if tried else validation(bench)
    for name, build in builds.items() if asked else ():
        answers = RunnableScorer(build).generate([one.prompt for one in asked], TOLD_TOKENS)
        right = [one.right(answer) for one, answer in zip(asked, answers, strict=True)]
        tried.append({"prompt": name, "exact": sum(right) / len(right), "questions": len(right)})
    if file and asked:
        files.write(file, {"tried": tried})
    best = max(tried, key=lambda one: float(str(one["exact"])))["prompt"]
    return Fitted(
        scorer=RunnableScorer(builds[str(best)]),
        search=tried,
        seconds=time.perf_counter() - begun,
        notes={"prompt": READ[str(best)], "turns": turns},
    )


def validation(bench: Bench) -> list[Ask]:
    """Returns questions about facts that neither train nor score."""
    count = bench.setting.sizes.validation or VALIDATED
    if bench.worlds:
        items = [item for one in bench.exams for item in one.validation]
        return [Ask(item.prompt, item.right) for item in items[:count]]
    return lookups(None, count, part="validation")
