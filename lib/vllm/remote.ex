defmodule VLLM.Remote do
  @moduledoc false
  # Engines wherever they run: finds the node of one, and has what it is asked run there. On the
  # caller's own node no process stands in between; on another one VLLM.Remote.Call has its way, and
  # VLLM.Cluster chooses where several have the name.
  # guides/clusters.md says what is promised.

  alias VLLM.{Cluster, Error, LLM}
  alias VLLM.Engine.{Call, Operations, Table}
  alias VLLM.Remote

  @doc "What a user's name for engines stands for: one here, one on another node, or those of a cluster."
  @spec find(VLLM.engine()) ::
          {:here, id :: term()} | {:there, node(), id :: term()} | {:cluster, Cluster.Members.t()}
  def find(name) when is_atom(name) do
    case Cluster.Members.find(name) do
      nil -> {:here, name}
      members -> {:cluster, members}
    end
  end

  def find(engine) do
    case Table.locate(engine) do
      {node, id} when node == node() -> {:here, id}
      {node, id} -> {:there, node, id}
    end
  end

  @doc """
  Runs an operation on the engine's node. Where the node is lost before the answer came, it is run
  once more if the call has `retry: true`.
  """
  @spec run(VLLM.engine(), Operations.t(), Call.t()) :: :ok | {:ok, term()} | {:error, Error.t()}
  def run(engine, operation, call \\ Call.new(%{timeout: :infinity})) do
    case find(engine) do
      {:here, id} ->
        Operations.run(id, operation, call)

      {:there, node, id} ->
        with {:error, %Error{reason: :node_down}} when call.retry <-
               Remote.Call.run(node, id, {:run, operation}, call),
             do: Remote.Call.run(node, id, {:run, operation}, call)

      {:cluster, members} ->
        Cluster.Operations.run(members, operation, call)
    end
  end

  @doc "The same engine for whoever asks for it on another node, of one that was named on this."
  @spec pin(VLLM.engine()) :: VLLM.engine()
  def pin(name) when is_atom(name) do
    case find(name) do
      {:here, name} -> %LLM{id: name, model: "", node: node()}
      # It is the same on all nodes that have it.
      {:cluster, _members} -> name
    end
  end

  # Its module may find processes of other nodes, and be on this node only.
  def pin({:via, _, _} = name), do: pin(%LLM{id: name, model: "", node: node()})

  def pin(%LLM{} = llm) do
    {node, _id} = Table.locate(llm)
    %{llm | node: node}
  end

  def pin(engine), do: engine
end
