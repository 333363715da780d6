defmodule VLLM.Engine.Ranks do
  @moduledoc false
  # The other nodes of one run of an engine over several (`nodes:`): each has a VLLM.Engine.Rank. The
  # run's own program, the head, is loaded once all of them have said what they are; vLLM's processes
  # then find each other by an address and a port of the head. Any of them that ends, ends the run.

  alias VLLM.Engine.{Config, Rank}
  alias VLLM.Error

  # Where ports are looked for: below those that the system gives to clients.
  @ports 20_000..32_000

  defstruct keepers: %{}, greeted: %{}, checkpoint: nil

  @typedoc """
  `keepers` are the ranks' and their nodes; `greeted` what the programs that are there say of themselves, and
  `checkpoint` the one that all must have, with who was the first to tell of it.
  """
  @type t :: %__MODULE__{
          keepers: %{pid() => node()},
          greeted: %{node() => {hello :: map(), :inet.ip_address()}},
          checkpoint: {node(), String.t()} | nil
        }

  @doc "Starts those of a config for the calling process; none where it has no other nodes."
  @spec start(Config.t(), pos_integer()) :: t()
  def start(config, index) do
    program = %{
      name: Config.display_name(config),
      python: config.options.python,
      env: config |> Config.env(index) |> Map.new(),
      nursery: config.options.nursery
    }

    %__MODULE__{keepers: Map.new(others(config), &{Rank.start(&1, program), &1})}
  end

  defp others(config), do: Enum.drop(config.options.nodes || [], 1)

  @doc "The nodes that have not been heard of yet."
  @spec missing(t()) :: [node()]
  def missing(ranks), do: Map.values(ranks.keepers) -- Map.keys(ranks.greeted)

  @doc "Has all begin; returns the engine options by which the head meets them."
  @spec begin(t(), Config.t(), map(), (map() -> map())) :: {:ok, map()} | {:error, Error.t()}
  def begin(%{keepers: keepers}, _config, _hello, _params) when keepers == %{}, do: {:ok, %{}}

  def begin(ranks, config, hello, params) do
    with :ok <- check_versions(ranks, versions(hello)) do
      [first | _] = others = others(config)
      {_hello, address} = ranks.greeted[first]

      meeting = %{
        "nnodes" => 1 + length(others),
        "master_addr" => address |> :inet.ntoa() |> to_string(),
        "master_port" => free_port(),
        # Where several engines share requests (data_parallel_size).
        "data_parallel_rpc_port" => free_port()
      }

      keepers = Map.new(ranks.keepers, fn {keeper, node} -> {node, keeper} end)

      for {node, rank} <- Enum.with_index(others, 1),
          do: Rank.run(keepers[node], params.(Map.put(meeting, "node_rank", rank)))

      {:ok, Map.put(meeting, "node_rank", 0)}
    end
  end

  defp check_versions(ranks, ours) do
    Enum.find_value(ranks.greeted, :ok, fn {node, {hello, _address}} ->
      theirs = versions(hello)

      with name when name != nil <-
             Enum.find(Map.keys(Map.merge(ours, theirs)), &(ours[&1] != theirs[&1])) do
        {:error,
         Error.new(
           :node_incompatible,
           "The node #{node} has #{name} #{theirs[name] || "not at all"}, and this one " <>
             "#{ours[name] || "not at all"}. An engine over several nodes needs the same packages on " <>
             "each: run `mix vllm.setup` there, too.",
           %{"node" => Atom.to_string(node), "package" => name}
         )}
      end
    end)
  end

  # What the processes of different nodes tell each other is Python's own.
  defp versions(hello) do
    [major, minor] = hello["python"] |> String.split(".") |> Enum.take(2)

    Map.merge(hello["packages"], %{
      "Python" => "#{major}.#{minor}",
      "vllm_bridge" => hello["bridge"]
    })
  end

  defp free_port do
    port = Enum.random(@ports)

    case :gen_tcp.listen(port, []) do
      {:ok, socket} ->
        :gen_tcp.close(socket)
        port

      {:error, :eaddrinuse} ->
        free_port()
    end
  end

  @doc "Takes note of what is told of one of them, or of the head; an error ends the run."
  @spec hear(t(), node(), Rank.told()) :: {:ok, t()} | {:error, Error.t()}
  def hear(ranks, _node, :away), do: {:ok, ranks}

  def hear(ranks, node, {:greeted, hello, address}),
    do: {:ok, put_in(ranks.greeted[node], {hello, address})}

  def hear(%{checkpoint: nil} = ranks, node, {:checkpoint, checkpoint}),
    do: {:ok, %{ranks | checkpoint: {node, checkpoint}}}

  def hear(%{checkpoint: {_node, same}} = ranks, _other, {:checkpoint, same}), do: {:ok, ranks}

  def hear(%{checkpoint: {node, _}}, other, {:checkpoint, _differs}) do
    {:error,
     Error.new(
       :node_incompatible,
       "The model's files on the node #{other} are not those on #{node}. Copy them from one to the " <>
         "other, or name a `revision` of the hub.",
       %{"nodes" => Enum.map([node, other], &Atom.to_string/1)}
     )}
  end

  def hear(_ranks, _node, {:ended, error}), do: {:error, error}

  @doc "Has all end."
  @spec stop(t()) :: :ok
  def stop(ranks), do: ranks.keepers |> Map.keys() |> Enum.each(&Rank.stop/1)

  @doc "Returns when nothing is left of any."
  @spec await_end(t()) :: :ok
  def await_end(ranks), do: ranks.keepers |> Map.keys() |> Enum.each(&Rank.await_end/1)
end
