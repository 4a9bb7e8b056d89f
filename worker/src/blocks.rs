//! Blocks: fetched ahead of need, kept while leased.
