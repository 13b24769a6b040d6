"""Make the small teacher and student, their tokenizer and their problems, all in this folder.

The task is multi-step arithmetic with written-out reasoning and a checkable answer. The teacher learns from right
solutions; the student from a careless solver that often forgets the carry (or the borrow), so it knows the format and
the method and computes badly: what on-policy distillation can repair in a few dozen steps. Plain PyTorch and
transformers, nothing of megatron_tropd. The same seed and PyTorch build give the same files.

    python examples/tiny/make_tiny.py                                  # rebuild everything here
    python examples/tiny/make_tiny.py --output /tmp/trial --teacher-steps 200
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivan", "June", "Kofi", "Lena")
ITEMS = ("apples", "books", "coins", "cards", "eggs", "keys", "nuts", "pens", "shells", "stamps", "stones", "tickets")
GAINS = ("buys", "finds", "gets", "makes", "wins")
LOSSES = ("drops", "gives", "loses", "sells", "uses")
ANSWER = re.compile(r"####\s*(-?\d+)")
BOS_ID, EOS_ID, PAD_ID = 1, 2, 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Answer:\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A word problem: a number, then signed changes to it."""

    question: str
    start: int
    changes: tuple[int, ...]

    @property
    def answer(self) -> int:
        """The right result."""
        return self.start + sum(self.changes)


def parse(question: str) -> tuple[int, tuple[int, ...]]:
    """Read start and signed changes back from a question's text."""
    start = int(re.search(r"has (\d+)", question).group(1))
    verbs = re.findall(rf"({'|'.join(GAINS + LOSSES)}) (\d+)", question)
    return start, tuple(int(n) if verb in GAINS else -int(n) for verb, n in verbs)


def forget_carry(left: int, change: int) -> int:
    """Add two-digit numbers column by column without carrying; subtract the smaller digit from the larger instead of
    borrowing: 34 + 27 = 51, 42 - 18 = 36. The two mistakes differ in size, so they seldom cancel each other out.
    """
    units, tens = left % 10, left // 10
    if change > 0:
        return (tens + change // 10) * 10 + (units + change) % 10
    return (tens - -change // 10) * 10 + abs(units - -change % 10)


def solution(problem: Problem, rng: random.Random | None = None, slip: float = 0.0) -> str | None:
    """Write the steps and the answer; forget each carry with probability `slip`. None if that leaves 0..99."""
    value, lines = problem.start, []
    for change in problem.changes:
        careless = rng is not None and rng.random() < slip
        result = forget_carry(value, change) if careless else value + change
        if not 0 <= result <= 99:
            return None
        lines.append(f"{value}{change:+d}={result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def draw_problems(count: int, seed: int, taken: set) -> list[Problem]:
    """Draw problems of two or three changes whose numbers are not in `taken`, and add them to it."""
    rng, problems = random.Random(seed), []
    while len(problems) < count:
        value = start = rng.randint(2, 99)
        changes = []
        for _ in range(rng.choice((2, 3, 3))):
            low, high = (2, 99 - value) if rng.random() < 0.5 else (-value, -2)
            if low > high:
                low, high = (-value, -2) if value > 50 else (2, 99 - value)
            changes.append(rng.randint(low, high))
            value += changes[-1]
        if (start, *changes) in taken:
            continue
        taken.add((start, *changes))
        item = rng.choice(ITEMS)
        deeds = ", ".join(f"{rng.choice(GAINS if c > 0 else LOSSES)} {abs(c)}" for c in changes)
        question = f"{rng.choice(NAMES)} has {start} {item}, {deeds}. How many {item} now?"
        problems.append(Problem(question, start, tuple(changes)))
    return problems


def train_tokenizer(problems: list[Problem], folder: Path, vocab_size: int) -> None:
    """Train a sentencepiece BPE model (single digits, spaces kept as they are, newline one piece) and its HF twin."""
    lines = [line for p in problems for line in (p.question, "Answer:", *solution(p).split("\n"))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        required_chars="".join(map(chr, range(33, 127))),
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        **{"split_digits": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        **{"unk_id": 0, "bos_id": BOS_ID, "eos_id": EOS_ID, "pad_id": PAD_ID, "minloglevel": 2},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    save_hf_tokenizer(folder)


def save_hf_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json that encode exactly as the sentencepiece model in `folder`."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [
        (pieces.get_score(i), -i, (piece[:cut], piece[cut:]))
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if i > PAD_ID and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:2], reverse=True)  # best score first, as sentencepiece merges
    backend = Tokenizer(models.BPE(vocab, [pair for *_, pair in merges], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    # The class's name before transformers 5, which newer versions know as well.
    patch_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def patch_json(path: Path, **values) -> None:
    """Set keys of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def prompt_text(question: str) -> str:
    """The templated prompt without BOS."""
    return f"{question}\nAnswer:\n"


def model_config(kind: str, vocab_size: int) -> LlamaConfig:
    """The teacher: wider, untied embeddings, grouped heads. The student: narrower, tied. Both: TP and PP up to 4."""
    hidden, intermediate = {"teacher": (128, 384), "student": (96, 256)}[kind]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads={"teacher": 8, "student": 4}[kind],
        num_key_value_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=kind == "student",
        **{"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
    )


def encode_examples(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize (question, response) pairs: ids [n, s] padded right, and labels [n, s] (-100 outside responses)."""
    prompts = tokenizer([prompt_text(q) for q, _ in pairs]).input_ids
    responses = tokenizer([r for _, r in pairs], add_special_tokens=False).input_ids
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) + 1
    ids = torch.full((len(pairs), width), PAD_ID)
    labels = torch.full((len(pairs), width), -100)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = torch.tensor([*prompt, *response, EOS_ID])
        ids[i, : len(row)] = row
        labels[i, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
    return ids, labels


def train(model: LlamaForCausalLM, data: tuple[torch.Tensor, torch.Tensor], steps: int, args, name: str) -> None:
    """Minimise the cross-entropy of the responses with AdamW: short warm-up, cosine decay."""
    ids, labels = data
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.08)
    model.train()
    progress = tqdm(range(steps), desc=f"training the {name}", mininterval=2)
    for step in progress:
        rows = torch.randint(len(ids), (args.batch_size,), generator=generator)
        keep = labels[rows] != -100
        hidden = model.model(ids[rows], use_cache=False).last_hidden_state[keep]
        loss = F.cross_entropy(model.lm_head(hidden), labels[rows][keep])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def respond(model: LlamaForCausalLM, tokenizer, questions: list[str], batch_size: int = 256) -> list[str]:
    """Answer greedily, batched."""
    model.eval()
    responses = []
    for start in tqdm(range(0, len(questions), batch_size), desc="responding", leave=False):
        texts = [prompt_text(q) for q in questions[start : start + batch_size]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        responses += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return responses


def accuracy(responses: list[str], answers: list[int]) -> float:
    """Share of responses whose last `#### N` is the answer."""
    found = [ANSWER.findall(response) for response in responses]
    return sum(bool(f) and int(f[-1]) == a for f, a in zip(found, answers, strict=True)) / len(answers)


def save_model(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Save in bfloat16 and return what was saved, loaded back in float32."""
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    patch_json(folder / "config.json", rope_theta=10000.0, torch_dtype="bfloat16")  # their names before transformers 5
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_jsonl(path: Path, prefix: str, problems: list[Problem], responses: list[str] | None = None) -> None:
    """Write id, messages, answer and, if given, the teacher's response, one problem a line."""
    with path.open("w", encoding="utf-8") as file:
        for i, problem in enumerate(problems):
            record = {"id": f"{prefix}-{i:04d}", "messages": [{"role": "user", "content": problem.question}]}
            record["answer"] = str(problem.answer)
            if responses is not None:
                record["teacher_response"] = responses[i]
            file.write(json.dumps(record) + "\n")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path(__file__).parent, help="folder to write to (default: this one)")
    add("--seed", type=int, default=0, help="seed of problems, initial weights and batches (default: %(default)s)")
    add("--train-problems", type=int, default=60000, help="problems to train on (default: %(default)s)")
    add("--prompts", type=int, default=2000, help="lines of prompts.jsonl (default: %(default)s)")
    add("--problems", type=int, default=250, help="unseen problems in problems.jsonl (default: %(default)s)")
    add("--vocab-size", type=int, default=256, help="pieces of the tokenizer (default: %(default)s)")
    add("--teacher-steps", type=int, default=1400, help="training steps of the teacher (default: %(default)s)")
    add("--student-steps", type=int, default=1100, help="training steps of the student (default: %(default)s)")
    add("--slip", type=float, default=0.7, help="share of carries the student's data forget (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="examples a step (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Problems, tokenizer, teacher, student, prompt files."""
    args = arguments()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    taken: set = set()
    unseen = draw_problems(args.problems, args.seed + 1, taken)
    prompts = draw_problems(args.prompts, args.seed + 2, taken)
    training = draw_problems(args.train_problems, args.seed + 3, taken)

    teacher_folder, student_folder = args.output / "teacher", args.output / "student"
    for folder in (teacher_folder, student_folder):
        folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(training[:5000], teacher_folder, args.vocab_size)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (teacher_folder / name).exists():
            shutil.copy(teacher_folder / name, student_folder / name)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)

    rng = random.Random(args.seed)
    careless = [(p.question, solution(p, rng, args.slip)) for p in training]
    data = {
        "student": [(question, response) for question, response in careless if response is not None],
        "teacher": [(p.question, solution(p)) for p in training],
    }
    write_jsonl(args.output / "problems.jsonl", "problem", unseen)
    for kind, folder in (("student", student_folder), ("teacher", teacher_folder)):
        torch.manual_seed(args.seed)
        model = LlamaForCausalLM(model_config(kind, args.vocab_size))
        steps = args.teacher_steps if kind == "teacher" else args.student_steps
        train(model, encode_examples(tokenizer, data[kind]), steps, args, kind)
        model = save_model(model, folder)
        score = accuracy(respond(model, tokenizer, [p.question for p in unseen]), [p.answer for p in unseen])
        print(f"{kind}: {model.num_parameters():,} parameters, {score:.1%} of {len(unseen)} unseen problems right")
    responses = respond(model, tokenizer, [p.question for p in prompts])
    write_jsonl(args.output / "prompts.jsonl", "prompt", prompts, responses)
    print(f"teacher: {accuracy(responses, [p.answer for p in prompts]):.1%} of the training prompts right")


if __name__ == "__main__":
    main()
