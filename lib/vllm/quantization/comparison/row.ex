defmodule VLLM.Quantization.Comparison.Row do
  alias VLLM.{Error, Fields}

  @fields [
    model: "as it was named",
    format: "its format, such as `\"awq (4 bits)\"` or `\"gguf (Q4_K_M)\"`; `\"plain\"`",
    method: "vLLM's name of its quantization method; nil for a plain model",
    bits: "of each quantized weight",
    bits_per_weight: "of all that is stored, over all weights",
    parameters: "how many weights it has",
    bytes: "of its weights in files",
    memory: "bytes that they take once they are loaded, as estimated from the files' headers",
    tokens: "at how many places of the texts it was measured",
    perplexity:
      "exp(-1/n Σ ln q), with q the probability that it gave to each of n tokens that followed: how " <>
        "many tokens it is undecided between. Of models with the same tokens only the ratio counts",
    bits_per_byte:
      "what a byte of the texts takes if they are coded by its probabilities: the same in a unit that " <>
        "does not depend on the tokenizer",
    kl_mean:
      "KL divergence from the reference, Σ p ln(p/q) over the vocabulary, in nats, as the mean over " <>
        "all places; 0 is the same. Nil where the tokenizers differ, and where it has no end",
    kl_error: "the standard error of that mean",
    kl_p99: "what the divergence exceeds at one place of a hundred",
    same_top: "the share of places where both hold the same token for the likeliest, from 0 to 1",
    rest:
      "the mean probability of the tokens that were lumped together, because not both models have them " <>
        "among their 512 likeliest; 0 for vocabularies of up to 4096 tokens, which are compared whole. " <>
        "What the divergence misses is this times the divergence within them",
    same_answers:
      "the share of the tokens of greedy answers, 32 from each of the first three texts, that are the " <>
        "same up to the first that differs",
    answers: "those answers",
    tokens_per_second: "how fast the answers came, one at a time: the median of three",
    usual:
      "the mean KL divergence that its format is known to have, of another model and text; nil where " <>
        "none is known",
    verdict:
      "`:ok`; `:worse_than_usual` where it lost more than its format usually does, by a margin; `:broken` " <>
        "where it lost more than that and says something else than the reference; nil " <>
        "where nothing is usual: of plain models, of the reference, of models of another size, of " <>
        "formats that are not known",
    says: "sentences: why something was not compared, what went wrong, and what to try instead",
    note:
      "how it is computed, where there is something to say (`quantization_note` of the engine)",
    error: "the `VLLM.Error` with which it could not be measured; all but `:model` is nil then"
  ]

  @moduledoc """
  What one model has lost, a row of `VLLM.Quantization.Comparison`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          model: String.t(),
          format: String.t() | nil,
          method: String.t() | nil,
          bits: number() | nil,
          bits_per_weight: float() | nil,
          parameters: pos_integer() | nil,
          bytes: pos_integer() | nil,
          memory: pos_integer() | nil,
          tokens: pos_integer() | nil,
          perplexity: float() | nil,
          bits_per_byte: float() | nil,
          kl_mean: float() | nil,
          kl_error: float() | nil,
          kl_p99: float() | nil,
          same_top: float() | nil,
          rest: float() | nil,
          same_answers: float() | nil,
          answers: [String.t()] | nil,
          tokens_per_second: float() | nil,
          usual: float() | nil,
          verdict: :ok | :worse_than_usual | :broken | nil,
          says: [String.t()],
          note: String.t() | nil,
          error: Error.t() | nil
        }

  @verdicts %{"ok" => :ok, "worse_than_usual" => :worse_than_usual, "broken" => :broken}

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    row = struct!(__MODULE__, Fields.take(wire, @names))
    %{row | verdict: @verdicts[row.verdict], says: row.says || []}
  end

  @doc false
  @spec failed(String.t(), Error.t()) :: t()
  def failed(model, error), do: %__MODULE__{model: model, says: [error.message], error: error}
end
