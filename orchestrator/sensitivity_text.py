"""What a person reads of `dab sensitivity`."""

from typing import Any

from dabnn.planner import ONE_SIDED, UNPACKED
from orchestrator.output import Table


def sensitivity_text(data: dict[str, Any]) -> str:
    """Return a table of the layers, and the plan.

    Args:
        data: The JSON document of `dab sensitivity`.
    """
    plan = data["plan"]
    columns = {
        "layer": "index", "path": "path", "binary weights": "binary_weights", "binary inputs": "binary_inputs",
        "input rmse": "input_rmse", "relative": "input_relative_rmse", "1 - x^2": "input_one_minus_square",
        "weight error": "weight_error", "gain if real": "gain_if_real", "inputs only": "gain_if_real_inputs",
        "loss if binary": "loss_if_binary", "weights only": "loss_if_binary_weights",
    }  # fmt: skip
    rows = [{title: layer[key] for title, key in columns.items()} for layer in data["layers"]]
    accuracy = (
        f"{data['name']}: top-1 {data['top1']:.2f} % of {data['num_images']:,} validation images; gains count from "
        f"{data['top1_reestimated']:.2f} %, with BN statistics of {data['num_bn_batches']} training batches; one image "
        f"is {100 / data['num_images']:.2f} points"
    )
    limit, measure = plan["budget"]["limit"], plan["budget"]["measure"].replace("packed_", "")
    lines = [
        accuracy,
        str(Table.of(rows, list(columns))),
        f"plan from {plan['based_on']}, at most {limit:,.0f} {measure}",
        f"  binary weights: {', '.join(plan['binary_weights']) or 'none'}",
        f"  binary inputs: {', '.join(plan['binary_inputs']) or 'none'}",
        f"  predicted top-1: {plan['predicted_top1']:.2f} % before any training with the plan",
        f"  operations: {plan['operations']:,.0f} (this run {plan['own_operations']:,.0f})",
        f"  packed bytes: {plan['packed_bytes']:,} (this run {plan['own_packed_bytes']:,})",
        *_left_out_lines(plan["left_out"]),
    ]
    return "\n".join(lines)


def _left_out_lines(left_out: dict[str, str]) -> list[str]:
    """Return a line a reason for which layers were not considered with binary weights and inputs."""
    why = {
        ONE_SIDED: "their inputs are on one side of zero, as behind a ReLU, so that their signs would say nothing; a "
        "variant with signs (`dab models`) has BN before them",
        UNPACKED: "as depthwise or dilated layers they have no packed form, and export would refuse them",
    }
    return [
        f"  not considered with binary inputs: {', '.join(path for path, each in left_out.items() if each == reason)} "
        f"({text})"
        for reason, text in why.items()
        if reason in left_out.values()
    ]
