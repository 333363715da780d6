defmodule VLLM.Quantization.Choice do
  alias VLLM.Fields

  @moduledoc """
  A format that suits, one of `VLLM.Quantization.Advice`.

    * `:format` - its name, such as `"awq (4 bits)"`; `"plain"` is the model as it was trained
    * `:method` - vLLM's name of the method; nil for a plain model
    * `:disk`, `:memory` - bytes of its weights, in files and once they are loaded
    * `:needs` - bytes of memory in all: weights, KV cache, activations and what vLLM itself takes;
      for `:fine_tuning` what training takes
    * `:score` - from 0 to 1, by which the choices are in order
    * `:marks` - what it is made of: a map from the names of marks to numbers from 0 to 1
    * `:loss` - of quality: a map with its class (`"class"`: none, negligible, small, noticeable, large),
      the figure behind it (`"metric"`, `"value"`), `"words"` and the `"source"`; nil where the rules
      know none
    * `:speed` - relative to 16 bits on this device: a map with `"one"` (one sequence), `"many"` and
      their sources; nil where the rules know none
    * `:reasons` - sentences
    * `:ways` - how to have it, as maps with `"kind"` (`"as_is"`; `"in_flight"`: made of the plain model
      while it loads; `"hub"`: somebody has made it; `"make"`), the `"model"` and the `"options"` to
      load it with, and a `"text"` that says it
  """

  @names [:format, :method, :disk, :memory, :needs, :score, :marks, :loss, :speed] ++
           [:reasons, :ways]

  @enforce_keys @names
  defstruct @names

  @type t :: %__MODULE__{
          format: String.t(),
          method: String.t() | nil,
          disk: non_neg_integer(),
          memory: non_neg_integer(),
          needs: non_neg_integer(),
          score: float(),
          marks: %{String.t() => float()},
          loss: %{String.t() => term()} | nil,
          speed: %{String.t() => term()} | nil,
          reasons: [String.t()],
          ways: [%{String.t() => term()}]
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    struct!(__MODULE__, Fields.take(wire, @names))
  end
end
