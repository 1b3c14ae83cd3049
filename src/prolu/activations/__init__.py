"""Text goes in, shuffled batches of activations come out.

In the order of the data:

- `resolving`: what a source is, such as files, a hub dataset or an object, and its splits.
- `repository_files`: the files of each split, in a folder or a hub dataset.
- `shards`, `text_files`, `arrow_files`: one file of rows, and the readers of each format.
- `text_rows`: the rows of a split, or of a slice of it, from file to file.
- `chats`: lists of messages, which the tokenizer's chat template turns into text.
- `documents`: the texts of a split, some of which are held out.
- `packing`, `packer`: which text is read and where its blocks go, and documents made into blocks.
- `packing_progress`: what a packer must know to resume.
- `token_blocks`, `blocks_folder`: the blocks, in memory or in a folder, and how a folder of them is written.
- `tokenizers`: the BOS of a tokenizer, and the range of its ids; `token_texts`: the texts of its tokens.
- `language_model`, `hooks`: a language model, and the places in it where activations are read.
- `model_loading`: the weights and tokenizer of a language model, from a folder or the hub.
- `harvesting`, `store`, `store_writer`: activations of blocks, computed now, read from the disk or written there.
- `rows`: activations that come from no language model, such as arrays.
- `row_files`, `row_batches`: rows in files, and those that have a name; rows that come in batches.
- `synthetic`: rows that are sums of known features.
- `inputs`: what a stream reads, a text through a language model or rows.
- `stream`, `batch`, `windows`: shuffled batches, a pure function of a seed and an index, and how they divide the text.
- `window_filling`: how a window is filled with rows, and on a mesh what each process gets of it.
- `token_mask`, `kept_tokens`: what is left out of training and scores, and which tokens of a text are kept then.
- `held_windows`: the window that is trained on, and the next one, which a thread may fill meanwhile.
- `transfer`: activations copied to the device that trains.
- `options`: the command-line options that describe a stream.
- `source`: the language model, text and stream that options or a study's config describe, opened.
- `builtin`: the small language model that ships with the package, and its text.
"""
