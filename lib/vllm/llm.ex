defmodule VLLM.LLM do
  @moduledoc """
  The handle of an engine, as `VLLM.llm!/2` returns it. It may be sent to other
  processes, also of other nodes, and means the same engine there.

    * `:id` - the engine's name, or its supervisor where it has none
    * `:model` - the folder or hub id that it was started with
    * `:node` - the node that it runs on
  """

  @enforce_keys [:id, :model, :node]
  defstruct [:id, :model, :node]

  @type t :: %__MODULE__{id: term(), model: String.t(), node: node()}
end
