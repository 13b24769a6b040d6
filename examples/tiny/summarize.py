"""End of the quickstart: load the export with transformers, write summary.json, print the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_metrics(path: Path) -> list[dict]:
    """Return one dictionary per step."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_with_transformers(folder: Path, problem: dict) -> str:
    """Greedily answer one problem with the exported student in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        problem["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Gather what the run measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the quickstart")
    parser.add_argument("--seconds", type=int, required=True, help="wall-clock seconds of the whole script")
    args = parser.parse_args()
    train = json.loads((args.run / "train" / "summary.json").read_text())
    metrics = read_metrics(args.run / "train" / "metrics.jsonl")
    evaluations = [e for e in train["evaluations"] if "accuracy" in e]
    summary = {
        "teacher": {"accuracy": json.loads((args.run / "teacher.json").read_text())["accuracy"]},
        "student_before": {"accuracy": evaluations[0]["accuracy"]},
        "student_after": {"accuracy": evaluations[-1]["accuracy"]},
        "trust_fraction": [m["trust_fraction"] for m in metrics],
        "tensor_model_parallel_size": train["tensor_model_parallel_size"],
        "pipeline_model_parallel_size": train["pipeline_model_parallel_size"],
        "steps": train["steps"],
        "seconds": args.seconds,
    }
    (args.run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    problem = json.loads(Path("examples/tiny/problems.jsonl").read_text().splitlines()[0])
    answer = answer_with_transformers(args.run / "student_hf", problem)
    print(f"\nThe exported student in transformers\n  {problem['messages'][-1]['content']}\n  {answer!r}")
    print(f"\n{'unseen problems solved':<24}{'accuracy':>10}")
    for name in ("teacher", "student_before", "student_after"):
        print(f"{name.replace('_', ' '):<24}{100 * summary[name]['accuracy']:>9.1f}%")
    gain = 100 * (summary["student_after"]["accuracy"] - summary["student_before"]["accuracy"])
    print(f"{'gain':<24}{gain:>+9.1f}%   ({summary['steps']} steps, {summary['seconds']} s in all)")
    print(f"\n{args.run}/summary.json  {args.run}/train/report.html")


if __name__ == "__main__":
    main()
