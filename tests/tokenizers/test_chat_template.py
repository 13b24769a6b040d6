"""Chat templates: variables, tools, dates, refusals, files, and the same text as transformers renders."""

import datetime
import json
import logging

import pytest
import sentencepiece
from support.tiny_models import CHAT_TEMPLATE, make_tokenizer

from megatron_tropd.errors import UserError
from megatron_tropd.tokenizers.chat_template import ChatTemplate, read_template
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt

USER = [{"role": "user", "content": "2 + 2?"}]
CHAT = [{"role": "system", "content": "Be brief."}, *USER]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}A:{% if enable_thinking is defined and not enable_thinking %} quick{% endif %}"
    "{% endif %}"
)
# As Mistral's and Gemma's: no system message, roles in turns.
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content }}{% endfor %}"
)
DATED = "Today is {{ strftime_now('%d %B %Y') }}. {% for m in messages %}{{ m.content }}{% endfor %} A:"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentencepiece")
    lines = [f"the user said {n} and ASSISTANT: quick Today is January, 2 + 2? [{n}]" for n in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(root / "m"),
        **{"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False},
    )
    return root / "m.model"


@pytest.fixture(params=["hugging_face", "sentencepiece"])
def load(request, tmp_path, model_file):
    """Load a tokenizer of either class with a template."""
    make_tokenizer().save_pretrained(tmp_path / "hf")

    def loaded(template, **options):
        (tmp_path / "t.jinja").write_text(template)
        path = tmp_path / "hf" if request.param == "hugging_face" else model_file
        return load_tokenizer(path, tmp_path / "t.jinja", **options)

    return loaded


def text_of(tokenizer, messages=USER, **fields):
    """The text of a prompt, after making sure that its ids are those of the text."""
    prompt = Prompt("0", messages=messages, **fields)
    text = tokenizer.prompt_text(prompt)
    assert tokenizer.encode_prompt(prompt) == tokenizer.encode(text)
    return text


def test_field_cases_a18_variables_of_the_recipe_and_of_a_prompt_reach_the_template(load):
    assert text_of(load(THINKING)).endswith("A:")
    tokenizer = load(THINKING, chat_template_kwargs={"enable_thinking": False})
    assert text_of(tokenizer).endswith("A: quick")
    assert text_of(tokenizer, chat_template_kwargs={"enable_thinking": True}).endswith("A:")
    assert text_of(tokenizer).endswith("A: quick")  # a prompt's variables are its alone


def test_field_cases_a18_tools_reach_the_template(load):
    assert json.dumps(TOOLS) in text_of(load(THINKING), tools=TOOLS)
    assert "function" not in text_of(load(THINKING), tools=[])


def test_field_cases_a18_what_a_template_never_reads_is_named_once(load, caplog):
    tokenizer = load(THINKING, chat_template_kwargs={"enable_thinkin": False})
    with caplog.at_level(logging.WARNING):
        text_of(tokenizer)
        text_of(tokenizer)
    (message,) = (r.getMessage() for r in caplog.records if "never reads" in r.getMessage())
    assert "it never reads enable_thinkin, which has no effect (it reads enable_thinking)" in message
    caplog.clear()
    text_of(load(STRICT), tools=TOOLS)
    assert "never reads tools" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"tools": TOOLS}, "holds tools, which is set for every prompt; give tools as a field"),
        ({"add_generation_prompt": False}, "holds add_generation_prompt"),
        ({"messages": []}, "holds messages"),
    ],
)
def test_field_cases_a18_variables_that_are_set_anyway_are_refused(load, kwargs, said):
    with pytest.raises(UserError, match=said):
        text_of(load(THINKING), chat_template_kwargs=kwargs)


def test_field_cases_a19_the_date_is_the_given_one(load):
    tokenizer = load(DATED, date="2020-02-29")
    assert tokenizer.uses_date
    assert text_of(tokenizer).startswith("Today is 29 February 2020.")
    tokenizer.set_date("2021-03-01")
    assert text_of(tokenizer).startswith("Today is 01 March 2021.")
    assert text_of(load(DATED)).startswith(f"Today is {datetime.date.today():%d %B %Y}.")
    assert not load(THINKING).uses_date
    with pytest.raises(UserError, match=r"tokenizer\.date=29\.2\.2020 is not a date of the form 2025-01-31"):
        load(DATED, date="29.2.2020")


def test_field_cases_a19_llama_asks_for_the_date_only_where_none_is_given(load):
    llama = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
        "{%- endif %}{%- endif %}Today Date: {{ date_string }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert text_of(load(llama, date="2020-02-29")).startswith("Today Date: 29 Feb 2020")
    given = load(llama, date="2020-02-29", chat_template_kwargs={"date_string": "1 Jan 2000"})
    assert text_of(given).startswith("Today Date: 1 Jan 2000")


def test_field_cases_b3_a_refused_system_message_is_explained(load):
    with pytest.raises(UserError) as error:
        text_of(load(STRICT), CHAT)
    assert "t.jinja, line 1, refuses these messages (roles system, user): System role not supported." in str(
        error.value
    )
    assert "It takes them without the system message: remove it" in str(error.value)
    assert "tokenizer.chat_template=FILE.jinja" in str(error.value)
    assert "\n" not in str(error.value)


def test_field_cases_b3_roles_out_of_order_are_explained(load):
    with pytest.raises(UserError, match=r"\(roles user, user\): Roles must alternate\. Change the messages, or give"):
        text_of(load(STRICT), [*USER, *USER])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{{ m.tool_calls[0].name }}", "UndefinedError|'dict object' has no attribute 'tool_calls'"),
        ("{{ m.content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ m.content / 0 }}", "TypeError"),
        ("{{ 1 / 0 }}{{ m.content }}", "ZeroDivisionError: division by zero"),
        ("{{ m.content.__class__.__mro__ }}", "fails on.*unsafe"),
        ("{{ messages.append(1) }}", "fails on.*unsafe"),
        ("{{ nowhere() }}", "'nowhere' is undefined"),
        ("{% include 'other.jinja' %}", "fails on"),
        ("{{ m.content | no_such_filter }}", r"does not compile.*no_such_filter"),
    ],
)
def test_field_cases_b3_a_template_that_fails_is_no_traceback(load, body, said):
    with pytest.raises(UserError, match=rf"(?s)t\.jinja.*({said})"):
        text_of(load("{% for m in messages %}\n" + body + "\n{% endfor %}"))


@pytest.mark.parametrize(
    "text", ["{{ x }\n", "{% for m in messages %}{{ m.content }}", "{% endif %}", "{% nonsense %}"]
)
def test_field_cases_b3_a_template_that_does_not_compile_is_found_when_it_is_read(load, text):
    with pytest.raises(UserError, match=r"t\.jinja does not compile: line 2: .*Fix the template"):
        load("{{ bos_token }}\n" + text)


def test_field_cases_b3_a_broken_template_of_the_folder_names_its_file(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        if file == "chat_template.jinja":
            (tmp_path / file).write_text("a\n\n{% if %}")
        else:
            config["chat_template"] = "a\n\n{% if %}"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"{file} does not compile: line 3: "):
            load_tokenizer(tmp_path)
        (tmp_path / "good.jinja").write_text(CHAT_TEMPLATE)
        load_tokenizer(tmp_path, tmp_path / "good.jinja")  # one that is replaced does not matter
        load_tokenizer(tmp_path, with_template=False)


def test_field_cases_b3_what_renders_nothing_is_refused(load):
    only_tools = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=r"renders nothing for these messages \(roles User\)"):
        text_of(load(only_tools), [{"role": "User", "content": "2 + 2?"}])
    for constant in ("Hello", "{{ message }}A:", '{"chat_template": 1}'):
        with pytest.raises(
            UserError, match=r"does not show what the messages say \(roles user\): every prompt would be"
        ):
            text_of(load(constant))
    for nothing in ("", "\n", "{# #}", "{{ message }}"):
        with pytest.raises(UserError, match=r"t\.jinja renders nothing for these messages"):
            text_of(load(nothing))


def test_field_cases_b3_templates_of_multimodal_models_get_parts(load):
    parts = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    )
    assert text_of(load(parts + "|{% endfor %}"), CHAT) == "Be brief.|2 + 2?|"
    assert text_of(load("{% for m in messages %}{{ m.content[0]['text'] }}|{% endfor %}"), CHAT) == "Be brief.|2 + 2?|"


def test_a_template_without_generation_prompt_is_told_once(load, caplog):
    chatml = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    tokenizer = load(chatml)
    text_of(tokenizer)
    text_of(tokenizer)
    assert caplog.text.count("ignores add_generation_prompt") == 1
    assert "start without '<assistant>'" in caplog.text
    caplog.clear()
    text_of(load(chatml + "{% if add_generation_prompt %}<assistant>{% endif %}"))
    text_of(load(STRICT))  # an answer follows [/INST] at once
    assert "add_generation_prompt" not in caplog.text


def test_reasoning_is_found_under_each_of_its_names_and_empty_fields_are_left_out(load):
    template = load("{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = [*USER, {"role": "assistant", "content": "4", name: "sum", "tool_calls": None}, *USER]
        assert text_of(template, messages) == "2 + 2?4sumsum2 + 2?"
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": []}, *USER]
    assert "None" not in text_of(template, called)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends_of_a_file_do_not_reach_the_prompt(tmp_path, encoding, line_end):
    lines = ["{% for m in messages %}", "{{ m.content }} é", "{% endfor %}", "end"]
    (tmp_path / "t.jinja").write_bytes(line_end.join(lines).encode(encoding))
    assert read_template(tmp_path / "t.jinja").render(USER) == "2 + 2? é\nend"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_files_that_are_not_utf8_are_refused(tmp_path, encoding):
    (tmp_path / "t.jinja").write_bytes("é {{ messages[0].content }}".encode(encoding))
    with pytest.raises(UserError, match=r"tokenizer\.chat_template=.*t\.jinja is not UTF-8 text .* convert it"):
        read_template(tmp_path / "t.jinja")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_template(tmp_path)


def test_named_templates_of_a_folder_are_found(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = {"default": "D {{ messages[0].content }}", "tool_use": "T {{ messages[0].content }} {{ tools }}"}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert text_of(tokenizer) == "D 2 + 2?"
    assert text_of(tokenizer, tools=TOOLS).startswith("T 2 + 2?")
    (tmp_path / "chat_template.jinja").write_text("J {{ messages[0].content }}")  # takes precedence
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("A {{ messages[0].content }} {{ tools }}")
    tokenizer = load_tokenizer(tmp_path)
    assert text_of(tokenizer) == "J 2 + 2?"
    assert text_of(tokenizer, tools=TOOLS).startswith("A 2 + 2?")
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and none is named `default`"):
        ChatTemplate({"rag": "{{ 1 }}", "tool_use": "{{ 1 }}"}, "here").render(USER)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        THINKING,
        "  {%- set ns = namespace(n=0) %}\n{% for m in messages -%}\n    {% set ns.n = ns.n + 1 %}\n"
        "    {{ ns.n }}{{ m['content'] | trim }}\n{% endfor %}\n{{ bos_token }}{{ pad_token }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% macro f(x, y='<é>') %}{{ x | tojson(indent=2) }}{{ y | tojson }}{% endmacro %}{{ f(messages) }}",
        "{% if tools is not none %}T{% endif %}{{ documents is defined }}{{ messages[-1].content[::-1] }}",
        "{{ messages | map(attribute='content') | join(' / ') | upper }}{{ unk_token }}{{ nothing }}",
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_texts_are_those_of_transformers(template, tools):
    tokenizer = make_tokenizer()
    ours = ChatTemplate({"default": template}, "here")
    ours.special_tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    expected = tokenizer.apply_chat_template(
        CHAT, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert ours.render(CHAT, tools, {"enable_thinking": False}) == expected


@pytest.mark.parametrize("written", ["arguments | tojson", "'' + call.function.arguments"])
def test_field_cases_a18_arguments_of_tool_calls_are_objects_or_text_as_the_template_has_them(written):
    code = "{{ " + written.replace("arguments | ", "call.function.arguments | ") + " }}"
    text = "{% for m in messages %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}" + code
    template = ChatTemplate({"default": text + "{% endfor %}{% endfor %}"}, "here")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert template.render(messages) == 'Q{"a": 2}'
