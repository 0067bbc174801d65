"""`dsel shards`: a plan in words."""

from dsel_trl import cli

SIZES = "--number_of_shards 10 10 --sequence_per_shard 8 4 --sequence_sizes 4 8 --batch_mult 2 1 --curriculum 2 1"


def test_an_exact_plan(capsys):
    assert cli.main(["shards", "--total_tokens", "256", "--epochs", "2", *SIZES.split()]) == cli.DONE
    assert capsys.readouterr().out.splitlines()[1:] == [
        "--epochs 2",
        "--train-num-samples 128",
        "--dataset-batch-mult 2 1",
        "--source-num-seq-per-epoch 16 8",
        "--train-data-mix-weights 4 2",
    ]


def test_a_plan_that_cannot_be_exact_says_so(capsys):
    assert cli.main(["shards", "--total_tokens", "250", "--epochs", "2", *SIZES.split()]) == cli.DONE
    assert "of 250. Go with " in capsys.readouterr().out.splitlines()[0]


def test_mistakes_are_named(capsys):
    words = ["shards", "--total_tokens", "256", *SIZES.split()]
    assert cli.main([*words, "--global_batch", "4"]) == cli.MISTAKE
    assert "one shard per process holds 8" in capsys.readouterr().err
    assert cli.main([*words, "--gpus", "4"]) == cli.MISTAKE
    assert "'--gpus'" in capsys.readouterr().err
