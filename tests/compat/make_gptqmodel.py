"""A 4-bit checkpoint by GPTQModel: `python make_gptqmodel.py FLOAT OUT [--act-order]` in an environment with gptqmodel."""

import argparse
import os

# With one worker its scheduler divides by zero on a machine with two cores.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("float")
    parser.add_argument("out")
    parser.add_argument("--act-order", action="store_true")
    options = parser.parse_args()
    from gptqmodel import GPTQModel, QuantizeConfig

    from calibration import SENTENCES

    config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=options.act_order, act_group_aware=False)
    model = GPTQModel.load(options.float, config, device="cpu")
    model.quantize(SENTENCES, batch_size=1)
    model.save(options.out)


if __name__ == "__main__":
    main()
