defmodule VLLM.Remote do
  @moduledoc false
  # Engines wherever they run: finds the node of one, and has what it is asked run there. On the
  # caller's own node no process stands in between; on another one VLLM.Remote.Call has its way.
  # guides/clusters.md says what is promised.

  alias VLLM.Engine.{Call, Operations, Table}
  alias VLLM.{Error, LLM}
  alias VLLM.Remote

  @doc """
  Runs an operation on the engine's node. Where the node is lost before the answer came, it is run
  once more if the call has `retry: true`.
  """
  @spec run(VLLM.engine(), Operations.t(), Call.t()) :: :ok | {:ok, term()} | {:error, Error.t()}
  def run(engine, operation, call \\ Call.new(%{timeout: :infinity})) do
    case Table.locate(engine) do
      {node, id} when node == node() ->
        Operations.run(id, operation, call)

      {node, id} ->
        with {:error, %Error{reason: :node_down}} when call.retry <-
               Remote.Call.run(node, id, {:run, operation}, call),
             do: Remote.Call.run(node, id, {:run, operation}, call)
    end
  end

  @doc "The same engine for whoever asks for it on another node, of one that was named on this."
  @spec pin(VLLM.engine()) :: VLLM.engine()
  def pin(name) when is_atom(name), do: pin(%LLM{id: name, model: "", node: node()})
  # Its module may find processes of other nodes, and be on this node only.
  def pin({:via, _, _} = name), do: pin(%LLM{id: name, model: "", node: node()})

  def pin(%LLM{} = llm) do
    {node, _id} = Table.locate(llm)
    %{llm | node: node}
  end

  def pin(engine), do: engine
end
