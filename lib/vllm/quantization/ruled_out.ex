defmodule VLLM.Quantization.RuledOut do
  @moduledoc """
  A format that does not suit, one of `VLLM.Quantization.Advice`.

    * `:format` - its name
    * `:why` - `:cannot_run` on the device, `:does_not_fit` into its memory, or `:not_for_the_goal`
    * `:needs` - bytes of memory that it would take in all
    * `:message` - a sentence
  """

  alias VLLM.Fields

  @names [:format, :why, :needs, :message]
  @enforce_keys @names
  defstruct @names

  @type t :: %__MODULE__{
          format: String.t(),
          why: :cannot_run | :does_not_fit | :not_for_the_goal | String.t(),
          needs: non_neg_integer(),
          message: String.t()
        }

  @known Map.new([:cannot_run, :does_not_fit, :not_for_the_goal], &{Atom.to_string(&1), &1})

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    ruled_out = struct!(__MODULE__, Fields.take(wire, @names))
    %{ruled_out | why: Map.get(@known, ruled_out.why, ruled_out.why)}
  end
end
