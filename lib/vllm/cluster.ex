defmodule VLLM.Cluster do
  @moduledoc """
  One name for the engines of several nodes.

  On each node with a device, an engine:

      children = [
        {VLLM, name: MyApp.LLM, model: "/models/llama"},
        {VLLM.Cluster, name: MyApp.LLM}
      ]

  On nodes that only call, the cluster alone:

      children = [
        {VLLM.Cluster, name: MyApp.LLM, nodes: [:"gpu@10.0.0.2", :"gpu@10.0.0.3"]}
      ]

  On both, `VLLM.generate(MyApp.LLM, "…")` then asks any engine of that name on this node or a connected one.
  Nodes find each other by Erlang's distribution; who connects them does not matter (`nodes:`, libcluster, …).
  Hidden nodes (`-hidden`, or `dist_listen: false`) are not found: call their engines as `{MyApp.LLM, node}`.
  The engine of one node is `{MyApp.LLM, :"gpu@10.0.0.2"}`, also on that node itself.

  ## Which engine a request goes to

  The one of the caller's own node; where that is busier than the others, the one that has the
  beginning of the prompt, or its `session:`, in its cache; where that is busier, too, the less busy of
  its two stand-ins, which are always the same; else the less busy of any two (how busy others are is known a
  moment late: all that look for the least busy would find the same one). Busier is what has, for the requests that it computes at once, more than a quarter and one
  request more than all together, or a queue. Each prompt of a list, and of `VLLM.generate_stream/3`, is a
  request of its own. An engine that is full, drains, starts or was stopped is passed over; only where
  all are full is a call `:overloaded`, and where none is ready it waits until its deadline.

  A request whose node is lost with it ends with `:node_down`. With `retry: true` it is given to another engine,
  up to three times, unless some of its answer was delivered. So is one whose node has said nothing for `silent_after:`
  milliseconds, which gets no more requests until it does.

  ## What is asked of all, and what of one

  `VLLM.replicas/1` shows the replicas of all nodes. What is told to an engine (`VLLM.load_lora/3`, `VLLM.sleep/2`,
  `VLLM.health/2`, `VLLM.metrics/2` and their like) is told to each, and one that cannot makes it an error with the
  `details["node"]`. `VLLM.stop/1`, `VLLM.scale/3`, `VLLM.drain/3`, `VLLM.restart/3` and `VLLM.reload/3` are done to the engine of
  one node, and `:unsupported` with the name of a cluster.

  ## When not to use it

  The engines must be of one model with the same options: nothing compares them. For one that is larger
  than a machine, or where nodes do not trust each other, see guides/clusters.md.

  ## Options

  #{VLLM.Options.docs(VLLM.Options.cluster())}
  """

  alias VLLM.Cluster.Members
  alias VLLM.{Error, Options}

  @doc """
  The child spec for a supervision tree: `{VLLM.Cluster, name: MyApp.LLM}`. Raises `VLLM.Error` for options
  that are wrong.

      iex> VLLM.Cluster.child_spec(name: MyApp.LLM).id
      {VLLM.Cluster, MyApp.LLM}
  """
  @spec child_spec(keyword() | map()) :: Supervisor.child_spec()
  def child_spec(options) do
    known = Error.bang!(known(options))
    %{id: {__MODULE__, known.name}, start: {Members, :start_link, [known]}}
  end

  @doc """
  Starts one that ends with the calling process. Errors are `:invalid_option`, and `{:already_started, pid}`
  where this node has one of that name.

      {:ok, _pid} = VLLM.Cluster.start_link(name: MyApp.LLM)
  """
  @spec start_link(keyword() | map()) :: GenServer.on_start() | {:error, Error.t()}
  def start_link(options) do
    with {:ok, known} <- known(options), do: Members.start_link(known)
  end

  defp known(options) do
    with {:ok, known} <- Options.only(options, Options.cluster()) do
      if known.name,
        do: {:ok, known},
        else:
          {:error,
           Error.new(
             :invalid_option,
             "A cluster needs the `name:` of its engines: `{VLLM.Cluster, name: MyApp.LLM}`.",
             %{"option" => "name"}
           )}
    end
  end

  @doc """
  How the engines of a cluster stand, as this node knows it: a map from their nodes to `:ready`, `:waiting` (it
  starts or drains), `:silent` (its node has said nothing for `silent_after:`) or the `VLLM.Error` that calls would
  get: it failed, or was drained.
  `:not_running` where this node has no such cluster.

      {:ok, %{:"gpu@10.0.0.2" => :ready}} = VLLM.Cluster.nodes(MyApp.LLM)
  """
  @spec nodes(atom()) ::
          {:ok, %{node() => :ready | :waiting | :silent | Error.t()}} | {:error, Error.t()}
  def nodes(name) do
    case Members.find(name) do
      nil ->
        {:error,
         Error.new(
           :not_running,
           "There is no cluster #{inspect(name)} on this node; see `VLLM.Cluster`."
         )}

      members ->
        {:ok,
         Map.new(Members.standings(members), fn {node, standing} -> {node, shown(standing)} end)}
    end
  end

  defp shown(:ok), do: :ready
  defp shown(:wait), do: :waiting
  defp shown(:silent), do: :silent
  defp shown({:error, error}), do: error
end
