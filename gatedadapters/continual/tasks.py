"""Tasks, and streams of them. Both are checked when they are built, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.continual.digests import data_digest
from gatedadapters.continual.measures import ChoiceAccuracy, Collate, accuracy, exact_match, likelihood, nearest_class
from gatedadapters.data import (
    ChatTask,
    ChoiceTask,
    LanguageTask,
    MixedTaskCollator,
    MixedTaskDataset,
    Passage,
    PassageTask,
    TextTask,
)
from gatedadapters.data.language import LanguageCollator, LanguageDataset
from gatedadapters.errors import DataError, TaskError
from gatedadapters.supernet.attach import find_heads
from gatedadapters.training import MultiTaskClassifier


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: name of the task, which no other task of the stream has.
        train: examples to learn from: a data set with `len` and integer indices.
        held_out: examples to score on, as `measure` reads them.
        collate: from a list of examples to a batch.
        measure: from a model and this task to a score; higher is better.
        classes: names of the classes of a classification task; empty where the model's own output head is used, as in
            generation and multiple choice.
        heads: parameters (names or prefixes) that belong to this task. They are trained with the task under every
            strategy, and count neither as core nor as trained elements. Default: for a classification task everything
            outside the backbone, which tasks then share; for other tasks nothing.
    """

    name: str
    train: Any
    held_out: Any
    collate: Collate
    measure: Callable[[nn.Module, Task], float] = accuracy
    classes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def score(self, model: nn.Module) -> float:
        """The score of a model on the held-out data, in evaluation mode. The model's mode is then as before."""
        was_training = model.training
        model.eval()
        try:
            return self.measure(model, self)
        finally:
            model.train(was_training)

    def identity(self) -> dict[str, Any]:
        """What tells this task from another one: names, sizes, and a digest of every example."""
        return {
            "name": self.name,
            "train": len(self.train),
            "held_out": len(self.held_out),
            "classes": list(self.classes),
            "heads": list(self.heads),
            "measure": _callable_name(self.measure),
            "collate": _callable_name(self.collate),
            "data": data_digest(self.train, self.held_out),
        }


class TaskStream(Sequence[Task]):
    """Tasks in the order they come.

    Args:
        tasks: one or more.
        general: a task that is never trained; its score measures what the model can do in general.

    Raises:
        TaskError: no task, duplicate names, a task with one class, or a head that tasks with different classes share.
        DataError: a task without training or evaluation data, with data that has no length or no labels, or with
            labels outside its classes.
    """

    def __init__(self, tasks: Sequence[Task], general: Task | None = None) -> None:
        self.tasks, self.general = tuple(tasks), general
        if not self.tasks:
            raise TaskError(
                "a stream needs tasks",
                expected="at least one task",
                got="none",
                where="TaskStream",
                fix="give at least one task",
            )
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise TaskError(
                "two tasks have one name",
                expected="distinct names",
                got=", ".join(repeated),
                where="TaskStream",
                fix="name them apart",
            )
        for task in self.tasks:
            _check_data(task)
        if general is not None:
            _check_general(general)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    def ordered(self, order: Sequence[int]) -> TaskStream:
        """The same tasks in another order.

        Args:
            order: positions of the tasks, each once.

        Raises:
            TaskError: a position is missing, or there twice.
        """
        if sorted(order) != list(range(len(self))):
            raise TaskError(
                expected=f"each of 0..{len(self) - 1} once",
                got=list(order),
                where="TaskStream.ordered",
                fix="give a permutation",
            )
        return TaskStream([self.tasks[i] for i in order], self.general)

    def check(self, model: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Check that the tasks fit a model.

        Returns:
            For each task the names of its head's parameters.

        Raises:
            AttachError: the model lacks a head.
            TaskError: a head has another number of outputs than its task has classes, or tasks with different classes
                share a head.
        """
        heads = tuple(find_heads(model, task.heads or (None if task.classes else ())) for task in self.tasks)
        for index, task in enumerate(self.tasks):
            width = model.get_parameter(heads[index][-1]).shape[0] if heads[index] else len(task.classes)
            if task.classes and width != len(task.classes):
                raise TaskError(
                    "a head and its task's classes do not fit",
                    expected=f"{len(task.classes)} classes",
                    got=f"{width} outputs of {heads[index][-1]}",
                    where=f"task {task.name!r}",
                    fix="build the model with this task's classes",
                )
            for other in range(index):
                shared = sorted(set(heads[index]) & set(heads[other]))
                if shared and self.tasks[other].classes != task.classes:
                    raise TaskError(
                        "label spaces collide: tasks with different classes share a head",
                        expected="a head of its own for each, or the same classes",
                        got=f"{', '.join(self.tasks[other].classes[:4])} and {', '.join(task.classes[:4])}",
                        where=f"{shared[0]}: tasks {self.tasks[other].name!r} and {task.name!r}",
                        fix="use MultiTaskClassifier, which has one head per task",
                    )
        return heads


def classification_tasks(
    model: MultiTaskClassifier,
    tasks: Sequence[TextTask],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    split: str = "test",
) -> list[Task]:
    """Labelled texts as tasks of a classifier that has a head for each of them. They are scored by accuracy.

    Args:
        model: built for these tasks, in this order.
        tasks: tables of labelled texts.
        tokenizer: of the model.
        max_length: tokens after which a text is cut.
        split: that is held out: `validation` or `test`.

    Raises:
        TaskError: the model was built for other tasks.
        DataError: a task lacks the split.
    """
    if model.tasks != tuple(task.name for task in tasks):
        raise TaskError(
            expected=", ".join(model.tasks),
            got=", ".join(task.name for task in tasks),
            where="classification_tasks",
            fix="build the model with these tasks in this order",
        )
    collate = MixedTaskCollator(tokenizer)
    data = {part: MixedTaskDataset(tasks, tokenizer, part, max_length) for part in ("train", split)}
    found, ends = [], dict.fromkeys(data, 0)
    for index, (task, head) in enumerate(zip(tasks, model.heads, strict=True)):
        parts = {}
        for part, whole in data.items():
            start, ends[part] = ends[part], ends[part] + whole.sizes[index]
            parts[part] = [whole[i] for i in range(start, ends[part])]
        found.append(
            Task(task.name, parts["train"], parts[split], collate, accuracy, task.classes, heads=(f"heads.{head}",))
        )
    return found


def choice_tasks(
    tasks: Sequence[ChoiceTask], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 128, split: str = "test"
) -> list[Task]:
    """Multiple-choice questions as tasks of a causal language model.

    The model learns the right answers, and is scored by how often it gives them the highest mean log-probability per
    token. The tasks share the model's output head.

    Args:
        tasks: the questions.
        tokenizer: of the model.
        max_length: tokens after which question and answer are cut.
        split: that is held out: `validation` or `test`.
    """
    collate = LanguageCollator(tokenizer)
    found = []
    for task in tasks:
        train = LanguageDataset(task.train, tokenizer, max_length) if task.train else ()
        measure = ChoiceAccuracy(tokenizer, max_length)
        found.append(Task(task.name, train, task.split(split), collate, measure))
    return found


def answer_task(
    name: str,
    train: Sequence[Passage],
    held_out: Sequence[Passage],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
) -> Task:
    """Questions with answers as a task of a causal language model.

    It is scored by how often greedy decoding would give exactly the answer.

    Args:
        name: of the task.
        train: questions and answers to learn from.
        held_out: questions and answers to score on.
        tokenizer: of the model.
        max_length: tokens after which question and answer are cut.

    Raises:
        DataError: a question has no answer.
    """
    if any(passage.answer is None for passage in (*train, *held_out)):
        raise DataError(
            "a question has no answer",
            expected="an answer for each",
            got="none",
            where=f"task {name!r}",
            fix="name the column of the answers with answer=",
        )
    learned, scored = (LanguageDataset(p, tokenizer, max_length) if p else () for p in (train, held_out))
    return Task(name, learned, scored, LanguageCollator(tokenizer), exact_match)


def language_tasks(
    tasks: Sequence[LanguageTask[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    split: str = "test",
) -> list[Task]:
    """Texts, conversations and multiple-choice questions as tasks of a causal language model, which share its head.

    Multiple choice is scored by accuracy, texts with answers by exact match. Running text and conversations are scored
    by the geometric mean of the probabilities of their tokens, exp(-loss per token).

    Args:
        tasks: the tasks.
        tokenizer: of the model.
        max_length: tokens after which an example is cut.
        split: that is held out: `validation` or `test`.

    Raises:
        DataError: there is nothing to predict, or the tokenizer's chat template does not fit.
    """
    found = []
    for task in tasks:
        examples = task.split(split)
        if isinstance(task, ChoiceTask):
            found += choice_tasks([task], tokenizer, max_length=max_length, split=split)
        elif isinstance(task, PassageTask) and all(passage.answer is not None for passage in examples):
            found.append(answer_task(task.name, task.train, examples, tokenizer, max_length=max_length))
        else:
            packing = isinstance(task, ChatTask) and task.packing
            train = LanguageDataset(task.train, tokenizer, max_length, packing=packing)
            held_out = LanguageDataset(examples, tokenizer, max_length)
            found.append(Task(task.name, train, held_out, LanguageCollator(tokenizer), likelihood))
    return found


def first_example(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """The task's first training example as a batch on the model's device, without its label: a layout is discovered
    with it.
    """
    batch = task.collate([task.train[0]])
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if key != "labels"}


def check_mixing(tasks: Sequence[Task], kind: str) -> None:
    """Check that examples of several tasks can be in one batch.

    Args:
        tasks: one or more.
        kind: of the strategy that mixes them, for the error.

    Raises:
        TaskError: the tasks have different `collate` functions, so that one would misread the other's examples.
    """
    first = tasks[0].collate
    for task in tasks[1:]:
        names = _callable_name(first), _callable_name(task.collate)
        states = _callable_state(first), _callable_state(task.collate)
        if task.collate is not first and (names[0] != names[1] or states[0] != states[1]):
            raise TaskError(
                "tasks that are trained together make batches of different kinds",
                expected="one collate for all",
                got=" and ".join(names),
                where=f"strategy {kind}: tasks {tasks[0].name!r} and {task.name!r}",
                fix="put what differs, such as task_ids, into the examples",
            )


def _callable_state(function: Any) -> Any:
    """Attributes of a callable object; a plain function equals only itself."""
    return getattr(function, "__dict__", None) or id(function)


def _callable_name(function: Any) -> str:
    """Name of a function, or of the class of a callable object. Without the module: in a script it is `__main__`."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _check_data(task: Task) -> None:
    for part, data in (("training", task.train), ("evaluation", task.held_out)):
        _check_part(task, data, part)
    if task.measure is accuracy and not task.classes:
        raise TaskError(
            "a task that is scored by accuracy does not name its classes",
            expected="two classes or more",
            got="none",
            where=f"task {task.name!r}",
            fix="give Task(classes=), or another measure=",
        )
    if not task.classes:
        return
    labels = _labels(task, task.train, "training")
    if len(task.classes) < 2 or len(set(labels)) < 2:
        raise TaskError(
            "a task has one class",
            expected="examples of two classes or more",
            got=f"{len(set(labels))} of {len(task.classes)}",
            where=f"task {task.name!r}",
            fix="leave it out, or give it examples of another class",
        )
    if task.measure is accuracy:  # other measures may not read labels
        labels += _labels(task, task.held_out, "evaluation")
    outside = [label for label in labels if not 0 <= label < len(task.classes)]
    if outside:
        raise DataError(
            "a label lies outside the task's classes",
            expected=f"0..{len(task.classes) - 1}",
            got=outside[0],
            where=f"task {task.name!r}",
            fix="check the label column",
        )


def _check_general(task: Task) -> None:
    """Check a general task. Only `nearest_class` reads its training data, which may otherwise be empty."""
    _check_part(task, task.held_out, "evaluation")
    _check_part(task, task.train, "training", may_be_empty=task.measure is not nearest_class)
    if task.measure is nearest_class:
        _labels(task, task.train, "training")
    if task.measure in (nearest_class, accuracy):
        _labels(task, task.held_out, "evaluation")


def _check_part(task: Task, data: Any, part: str, *, may_be_empty: bool = False) -> None:
    if data is not None and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"the {part} data of a task cannot be indexed",
            expected="len and integer indices",
            got=type(data).__name__,
            where=f"task {task.name!r}",
            fix="put the examples into a list",
        )
    if data is None or not (may_be_empty or len(data)):
        raise DataError(
            f"a task has no {part} data",
            expected="at least one example",
            got="none",
            where=f"task {task.name!r}",
            fix="give it a table or a split",
        )


def _labels(task: Task, data: Any, part: str) -> list[int]:
    """The label of every example.

    Raises:
        DataError: an example has no label, or one that is no number.
    """
    found = []
    for index in range(len(data)):
        try:
            found.append(int(data[index]["labels"]))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            got = ", ".join(map(str, data[index])) if isinstance(data[index], Mapping) else type(data[index]).__name__
            raise DataError(
                f"an example of a task's {part} data has no label",
                expected="an index of a class under labels",
                got=got,
                where=f"task {task.name!r}, {part} example {index}",
                fix="name that column labels",
            ) from error
    return found
