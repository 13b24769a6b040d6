"""Text that is written while it is drawn: the pieces are the whole text, and no character or stop string is cut."""

import pytest
from support.tiny_tokenizers import write_byte_level, write_pieces

from megatron_tropd.evaluation.chat import TextStream
from megatron_tropd.rollout.decoding import Stops
from megatron_tropd.rollout.sampling import Response
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt

TEXTS = ["naïve café 好 🙂 中文字符", " a space first", "Hello world, hello  there\n", "🙂🙂", "", "é" * 9]


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        return load_tokenizer(write_byte_level(folder))
    return load_tokenizer(write_pieces(folder, "LlamaTokenizer"))


def stream(tokenizer, ids, stop=()):
    """Feed tokens as the sampler does; return the pieces and the whole text."""
    pieces = []
    writer, stops = TextStream(tokenizer, stop, pieces.append), Stops.of(tokenizer, stop)
    response = Response(Prompt(id="p"), sample_id=0, prefix=[], budget=len(ids))
    for token in ids:
        response.tokens.append(token)
        if stop and stops.found(tokenizer.decode, response.tokens):
            response.finish_reason = "stop"
        elif len(response.tokens) == len(ids):
            response.finish_reason = "length"
        writer(response)
        if response.finish_reason:
            break
    whole = stops.cut(tokenizer.decode_response, response.tokens)
    writer.finish(whole)
    return pieces, whole


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_whole_text(tokenizer, text):
    ids = tokenizer.encode_response(text)
    pieces, whole = stream(tokenizer, ids)
    assert "".join(pieces) == whole == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) < 6 or len(pieces) > 1  # it does appear while it is drawn


def test_bytes_that_become_no_character_are_written_in_the_end(tokenizer):
    ids = tokenizer.encode_response("a🙂")
    pieces, whole = stream(tokenizer, ids[:-1])
    assert "".join(pieces) == whole == tokenizer.decode_response(ids[:-1])
    assert "\ufffd" in whole


def test_a_stop_string_never_appears_not_even_in_part(tokenizer):
    pieces, whole = stream(tokenizer, tokenizer.encode_response("the answer\nQuestion: more"), stop=("\nQuestion:",))
    assert "".join(pieces) == whole == "the answer"
