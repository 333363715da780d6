defmodule VLLM.LoRARequest do
  @moduledoc """
  A LoRA adapter: vLLM's `LoRARequest`, by the same names. Made by `VLLM.lora_request!/3`.

    * `:lora_name` - what it is called; an engine knows one adapter of a name
    * `:lora_int_id` - vLLM's number for it
    * `:lora_path` - its folder, its name here (`VLLM.Models`), or its id on the Hugging Face hub
    * `:base_model_name` - the model that it was made for, or nil
    * `:load_inplace` - read its files again
    * `:is_3d_lora_weight` - its experts' weights are fused
  """

  @behaviour VLLM.Wire

  @enforce_keys [:lora_name, :lora_int_id, :lora_path]
  defstruct [
    :lora_name,
    :lora_int_id,
    :lora_path,
    :base_model_name,
    load_inplace: false,
    is_3d_lora_weight: false
  ]

  @type t :: %__MODULE__{
          lora_name: String.t(),
          lora_int_id: pos_integer(),
          lora_path: String.t(),
          base_model_name: String.t() | nil,
          load_inplace: boolean(),
          is_3d_lora_weight: boolean()
        }

  # vLLM's ids are positive integers of 32 bits.
  @ids 0x7FFFFFFF

  @doc false
  @spec new(String.t(), String.t()) :: t()
  def new(name, path) do
    # The same in every worker and after every restart, without anybody who hands ids out.
    id = :erlang.phash2({name, path}, @ids) + 1
    %__MODULE__{lora_name: name, lora_int_id: id, lora_path: path}
  end

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      lora_name: wire["lora_name"],
      lora_int_id: wire["lora_int_id"],
      lora_path: wire["lora_path"],
      base_model_name: wire["base_model_name"],
      load_inplace: wire["load_inplace"],
      is_3d_lora_weight: wire["is_3d_lora_weight"]
    }
  end

  @doc false
  @impl VLLM.Wire
  def __wire__(request), do: Map.from_struct(request)
end
