"""A script as in the documentation of sentence-transformers, which knows nothing of us. Arguments: encoder, output folder."""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

texts = [f"{colour} {animal} runs" for colour in ("red", "green", "blue") for animal in ("cat", "dog", "bird")]
pairs = [(a, b, float(a.split()[1] == b.split()[1])) for a in texts for b in texts]
columns = zip(*pairs, strict=True)
train_dataset = Dataset.from_dict(dict(zip(("sentence1", "sentence2", "score"), map(list, columns), strict=True)))

model = SentenceTransformer(sys.argv[1], device="cpu")
args = SentenceTransformerTrainingArguments(
    output_dir=sys.argv[2],
    num_train_epochs=4,
    per_device_train_batch_size=16,
    logging_steps=2,
    use_cpu=True,
    report_to="none",
    **dict(pair.split("=") for pair in sys.argv[3:]),
)
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=train_dataset, loss=CosineSimilarityLoss(model))
trainer.train()
trainer.save_state()
