"""End of the SmolLM2 example: held-out divergence before and after, sample texts, summary.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def read(path: Path) -> list[dict]:
    """Return a JSONL file's objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Gather what the run measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the example")
    parser.add_argument("--seconds", type=int, required=True, help="wall-clock seconds of the whole script")
    args = parser.parse_args()
    train = json.loads((args.run / "distill" / "summary.json").read_text())
    divergence = [e["held_out_kl"] for e in train["evaluations"]]
    asked = read(Path("examples/smollm2/held_out.jsonl"))
    texts = {name: read(args.run / f"samples_{name}.jsonl") for name in ("before", "after")}
    teacher = {r["id"]: r["teacher_response"] for r in read(args.run / "held_out_responses.jsonl")}
    prompts = {p["id"]: p["messages"][-1]["content"] for p in asked}
    summary = {
        "held_out_kl": {"before": divergence[0], "after": divergence[-1]},
        "reduction": 1 - divergence[-1] / divergence[0],
        "trust_fraction": [m.get("trust_fraction") for m in read(args.run / "distill" / "metrics.jsonl")],
        "samples": [
            {
                "prompt": prompts[before["id"]],
                "teacher": teacher[before["id"]],
                "before": before["response"],
                "after": after["response"],
            }
            for before, after in zip(texts["before"], texts["after"], strict=True)
        ],
        "pipeline_model_parallel_size": train["pipeline_model_parallel_size"],
        "steps": train["steps"],
        "seconds": args.seconds,
    }
    (args.run / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    exported = AutoModelForCausalLM.from_pretrained(args.run / "student_hf", dtype=torch.bfloat16)
    for sample in summary["samples"]:
        print(f"\n> {sample['prompt']}")
        for name in ("teacher", "before", "after"):
            print(f"  {name:<8}{sample[name]!r}")
    print(f"\nthe exported student in transformers: {exported.num_parameters():,} parameters")
    print(f"held-out KL to the teacher, nats a token: {divergence[0]:.3f} before, {divergence[-1]:.3f} after")
    print(f"reduction {summary['reduction']:.1%} in {summary['steps']} steps, {summary['seconds']} s in all")
    print(f"\n{args.run}/summary.json  {args.run}/distill/report.html")


if __name__ == "__main__":
    main()
