"""Words of the command line: the names of the commands, and what people type in place of these and of options."""

from __future__ import annotations

COMMANDS = {
    "avg": "Average a series of checkpoints into one set of weights.",
    "look": "Show where the checkpoints of a series lie to each other, before they are averaged.",
    "sweep": "Average a series in many ways, score each average, and find the best.",
    "eval": "Score checkpoints on the same data, and compare averages with the best single one.",
    "convert": "Write a checkpoint in another layout, file format or dtype.",
    "fix-prefix": "Take wrapper prefixes off the names; nothing else changes.",
    "inspect": "Show what a checkpoint holds, from its header alone, or list several.",
    "diff": "Show what differs between two checkpoints.",
    "verify": "Check that checkpoints are whole, and that outputs are what their records say.",
    "strip": "Drop the optimizer and the rest of the training state.",
    "recal-bn": "Recalibrate the BatchNorm statistics of averaged weights.",
    "tune": "Train the classifier of averaged weights at the size of the test, or more of the network, "
    "or from a teacher.",
    "card": "Write a model card for the Hugging Face Hub, from the record in an output of ckpt.",
    "clean": "Remove what killed jobs have left in a folder.",
}
"""Each with the first line of its help; a function in a module of its name makes it, see `arguments.with_options`."""

_WORDS = {
    "avg": "average averaging mean merge merge-checkpoints combine blend fuse swa lawa polyak",
    "avg --mode ema": "ema",
    "sweep": "soup greedy search grid optimize",
    "eval": "evaluate evaluation score accuracy benchmark bench",
    "look": "plot distance distances geometry landscape",
    "inspect": "info show ls list describe summary print view cat head keys stat stats dump tensors metadata",
    "diff": "compare cmp delta",
    "convert": "export save cast to half fp16 bf16 quantize safetensors",
    "fix-prefix": "prefix rename unwrap fix strip-prefix remove-prefix",
    "recal-bn": "bn recal recalibrate update-bn updatebn precise-bn batchnorm",
    "verify": "check validate test checksum sha256",
    "strip": "slim prune shrink reduce clear-optimizer",
    "tune": "train finetune fine-tune distill fixres",
    "card": "model-card modelcard readme upload push",
    "clean": "rm gc purge cleanup clear",
}
"""What people look for, with the words that they try."""
MEANT = {word: meant for meant, words in _WORDS.items() for word in words.split()}
"""Words that people try, with what they look for."""

OPTIONS = {
    "--output": "-o",
    "--output-file": "-o",
    "--output-path": "-o",
    "--outfile": "-o",
    "--destination": "-o",
    "--overwrite": "--force",
    "--yes": "--force",
    "--ema": "--mode ema",
    "--swa": "--mode uniform",
    "--uniform": "--mode uniform",
    "--beta": "--decay",
    "--alpha": "--decay",
    "--momentum": "--decay",
    "--num": "--last",
    "--top-k": "--best",
    "--precision": "--dtype",
    "--format": "-o NAME.safetensors or -o NAME.pth",
    "--workers": "--threads",
    "--num-threads": "--threads",
    "--gpu": "--device cuda",
    "--cuda": "--device cuda",
    "--cpu": "--device cpu",
    "--use-ema": "--state ema",
    "--non-strict": "--keys intersection",
    "--recursive": "'runs/**/*.pth'",
    "-n": "--last",
    "-f": "--force",
    "-y": "--force",
}
"""Options that people try, with what they look for."""
