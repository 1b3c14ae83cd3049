"""Pages of latents: the text on which each latent is active, and the tokens that it promotes.

- `pages`: which runs of a study get pages, and which they have already.
- `browser`: writes the pages of one SAE.
- `text_page`: writes a page with the latents on a text of one's own.
- `firings`: when and how strongly latents are active on held-out text.
- `row_examples`: what stands for rows that come from no language model: numbers, labels or images.
- `accumulators`: what is kept of them while the text is read in parts.
- `cofiring`: which latents are active on the same tokens.
- `directions`: promoted tokens and similar latents, from the decoder alone.
"""
