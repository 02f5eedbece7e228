"""A script as in the documentation of setfit, which knows nothing of us. Arguments: encoder, output folder."""

import sys

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments

texts = [f"{colour} {animal} sleeps" for colour in ("red", "green", "blue") for animal in ("cat", "dog")]
train_dataset = Dataset.from_dict({"text": texts, "label": [text.split()[1] for text in texts]})

model = SetFitModel.from_pretrained(sys.argv[1], labels=["cat", "dog"], device="cpu")
args = TrainingArguments(output_dir=sys.argv[2], batch_size=4, num_epochs=8, logging_steps=2, report_to="none")
trainer = Trainer(model=model, args=args, train_dataset=train_dataset)
trainer.train()
print("predicted", *model.predict(texts))
