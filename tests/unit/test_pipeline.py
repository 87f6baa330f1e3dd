"""One micro-batch: every record ends once, and nothing that teaches touches the answer."""

import json
from collections.abc import Sequence

import pytest

from dylora_stream.core.errors import BadRecord, BrokerError, ModelError
from dylora_stream.core.messages import Answer, Position, RawRecord, Request, Topic
from dylora_stream.serve.pipeline import Pipeline, PipelineConfig, Serving
from dylora_stream.stream.wire import WireCodec
from dylora_stream.testing import ManualClock, UniformAnswerer

SERVING = Serving(model="tiny", registry_number=3, feature_space="space")


class ChokingAnswerer(UniformAnswerer):
    """Fails on any batch that holds the text `choke`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See the port."""
        if any(request.input == "choke" for request in requests):
            raise self._error
        return super().answer(requests)


class ClumsyLimits:
    """Limits that cannot be read: the codec raises what its contract does not know."""

    max_bytes = 1000

    @property
    def max_choices(self) -> int:
        """Only asked for where a record has choices."""
        raise KeyError("surprise")


class SpyingAnswerer(UniformAnswerer):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Request] = []

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See the port."""
        self.seen.extend(requests)
        return super().answer(requests)


def records(*values: object) -> list[RawRecord]:
    """JSON values (or bytes as they are) as records of one partition."""
    raw = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    return [
        RawRecord(position=Position("requests", 0, n), key=b"k", value=value) for n, value in enumerate(raw)
    ]


def pipeline(answerer: UniformAnswerer, share: float = 0.0) -> Pipeline:
    """A pipeline around an answerer."""
    codec = WireCodec(source="/test")
    return Pipeline(answerer, codec, ManualClock(), PipelineConfig(sample_share=share))


def topics(outcome: object) -> list[Topic]:
    """The topics of an outcome's messages, in order."""
    return [message.topic for message in outcome.messages]  # type: ignore[attr-defined]


def test_every_record_ends_as_a_result_or_a_dead_letter() -> None:
    """Bad records go to dead letters and the good ones around them are answered."""
    outcome = pipeline(UniformAnswerer()).answer(records({"input": "a"}, b"{broken", {"input": "b"}), SERVING)
    assert sorted(topics(outcome)) == sorted([Topic.DEAD_LETTERS, Topic.RESULTS, Topic.RESULTS])
    assert [(letter.reason, letter.record.position.offset) for letter in outcome.dead_letters] == [
        ("malformed_json", 1)
    ]


def test_a_record_that_the_codec_chokes_on_is_buried_and_the_rest_goes_on() -> None:
    """A fault of the codec costs the one record that meets it: raised, it would stop every process that takes it."""
    codec = WireCodec(source="/test", limits=ClumsyLimits())  # type: ignore[arg-type]
    outcome = Pipeline(UniformAnswerer(), codec, ManualClock(), PipelineConfig()).answer(
        records({"input": "a"}, {"input": "b", "choices": ["c"]}), SERVING
    )
    assert topics(outcome).count(Topic.RESULTS) == 1
    assert [letter.reason for letter in outcome.dead_letters] == ["undecodable"]
    letter = next(message for message in outcome.messages if message.topic is Topic.DEAD_LETTERS)
    assert b"KeyError: 'surprise'" in dict(letter.headers)["dylora.error.message"]


@pytest.mark.parametrize(
    "error", [BadRecord("too_long", "too long", stage="answer"), RuntimeError("shape"), TypeError("text")]
)
def test_a_record_that_the_model_chokes_on_is_found_by_halving(error: Exception) -> None:
    """One culprit in eight is dead-lettered alone, whatever the model raised."""
    texts = [{"input": f"text {n}"} for n in range(7)] + [{"input": "choke"}]
    outcome = pipeline(ChokingAnswerer(error)).answer(records(*texts), SERVING)
    assert topics(outcome).count(Topic.RESULTS) == 7
    assert topics(outcome).count(Topic.DEAD_LETTERS) == 1


def test_a_model_that_fails_at_everything_stops_the_process_and_buries_nothing() -> None:
    """A device that is gone is not the records' fault: a plain text fails as well."""

    class BrokenAnswerer(UniformAnswerer):
        """Its device is gone."""

        def answer(self, requests: Sequence[Request]) -> list[Answer]:
            """See the port."""
            raise RuntimeError("device lost")

    with pytest.raises(ModelError, match="device lost"):
        pipeline(BrokenAnswerer()).answer(records({"input": "a"}, {"input": "b"}), SERVING)


def test_a_broken_broker_is_no_bad_record() -> None:
    """Errors that are not the record's pass through; the process has to stop."""
    with pytest.raises(BrokerError):
        pipeline(ChokingAnswerer(BrokerError("gone"))).answer(records({"input": "choke"}), SERVING)


def test_the_right_answer_never_reaches_the_model() -> None:
    """`output` and `skill` are taken off before the model sees the request; the sample keeps the output."""
    spy = SpyingAnswerer()
    outcome = pipeline(spy).answer(records({"input": "a", "output": "right", "skill": "s"}), SERVING)
    assert [(request.output, request.skill) for request in spy.seen] == [(None, None)]
    sample = next(message for message in outcome.messages if message.topic is Topic.SAMPLES)
    assert json.loads(sample.value or b"")["output"] == "right"


def test_novel_records_become_samples_and_events() -> None:
    """A novel record is kept for learning and announced."""
    outcome = pipeline(UniformAnswerer(is_novel=True)).answer(records({"input": "a"}), SERVING)
    assert set(topics(outcome)) == {Topic.RESULTS, Topic.SAMPLES, Topic.EVENTS}


def test_the_hashed_share_is_about_the_share_asked_for() -> None:
    """Plain records are sampled by a hash of their position, so a batch taken again samples the same ones."""
    many = records(*({"input": "a"} for _ in range(2000)))
    first, second = (pipeline(UniformAnswerer(), share=0.1).answer(many, SERVING) for _ in range(2))
    kept = [message.value for message in first.messages if message.topic is Topic.SAMPLES]
    assert kept == [message.value for message in second.messages if message.topic is Topic.SAMPLES]
    assert 120 < len(kept) < 280
