defmodule VLLM.Quantization.RuledOut do
  @moduledoc """
  A format that does not suit, one of `VLLM.Quantization.Advice`.

    * `:format` - its name
    * `:why` - `:cannot_run` on the device, `:does_not_fit` into its memory, or `:not_for_the_goal`
    * `:needs` - bytes of memory that it would take in all
    * `:message` - a sentence
  """

  @enforce_keys [:format, :why, :needs, :message]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          format: String.t(),
          why: :cannot_run | :does_not_fit | :not_for_the_goal | String.t(),
          needs: non_neg_integer(),
          message: String.t()
        }

  @by_name Map.new([:cannot_run, :does_not_fit, :not_for_the_goal], &{Atom.to_string(&1), &1})

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(%{"why" => why} = wire) do
    %__MODULE__{
      format: wire["format"],
      why: Map.get(@by_name, why, why),
      needs: wire["needs"],
      message: wire["message"]
    }
  end
end
