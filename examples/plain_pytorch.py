"""Two small networks learn scikit-learn's digits and teach each other; started by itself, one learns alone.

codistill-launch --num-models 2 -- python examples/plain_pytorch.py
python examples/plain_pytorch.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairseq_codistill import Codistiller, CoordinatedBatches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--codec", default="fp16", help="how predictions travel")
    options = parser.parse_args()

    images, classes = load_digits(return_X_y=True)
    images, classes = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes)
    dataset = TensorDataset(images[::2], classes[::2], torch.arange(len(classes[::2])))  # the other half is for testing
    loader = DataLoader(dataset, batch_sampler=CoordinatedBatches(len(dataset), batch_size=50))

    with Codistiller(codec=options.codec, divergence="kl") as peers:
        me = peers.config.codistill_model_index
        torch.manual_seed(1 + me)  # another start and other dropout for every model
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        peers.meet(model, loader)
        for epoch in range(1, options.epochs + 1):
            model.train()
            for inputs, targets, ids in loader:
                loss = peers.loss(model(inputs), targets, ids)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            figures = peers.figures()  # means over this epoch
            if epoch % 10 == 0 or epoch == options.epochs:
                with torch.no_grad():
                    guesses = model.eval()(images[1::2]).argmax(1)
                accuracy = float((guesses == classes[1::2]).float().mean())
                print(
                    f"model {me}  epoch {epoch:3d}  test accuracy {accuracy:.3f}  agreement with peers in training "
                    f"{figures['codistill_agreement']:.3f}  bits an update {figures['codistill_mbit'] * 1e6:,.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
