defmodule VLLM.Cluster.Operations do
  @moduledoc false
  # What VLLM.Engine.Operations is to an engine, for the engines of a cluster: what each of them is
  # asked, what any of them answers, and what is done to one of them only.

  alias VLLM.Bridge.Inbox
  alias VLLM.Cluster.{InFlight, Members}
  alias VLLM.Engine
  alias VLLM.Engine.{Call, Router}
  alias VLLM.{Error, Remote}

  # What any of them may say instead of an answer that others have.
  @elsewhere [:node_down, :node_incompatible, :not_running, :shutdown, :failed]

  # For how long `VLLM.replicas/1` waits, in ms: it has no timeout of its own.
  @patience 5_000

  @doc "Runs an operation on a cluster."
  @spec run(Members.t(), Engine.Operations.t(), Call.t()) ::
          :ok | {:ok, term()} | {:error, Error.t()}
  def run(members, {:map, method, params}, call),
    do: Router.map(&InFlight.new(members, method, &1), params, call)

  def run(members, :await_ready, call), do: Members.await(members, call)

  def run(members, any, call) when any in [:info, :labels], do: anywhere(members, any, call, [])

  # All that there are, whether they are ready or not: that a node was left out would go unnoticed.
  def run(members, {:each, _method, _params} = each, call) do
    with :ok <- Members.await(members, call) do
      answers = everywhere(members, Map.keys(Members.standings(members)), each, call)

      case List.keyfind(answers, :error, 1) do
        nil -> {:ok, Enum.flat_map(answers, fn {_node, :ok, results} -> results end)}
        {node, :error, error} -> {:error, on(error, node)}
      end
    end
  end

  def run(members, :replicas, _call) do
    nodes = for {node, standing} <- Members.standings(members), standing != :silent, do: node
    answers = everywhere(members, nodes, :replicas, Call.new(%{timeout: @patience}))

    {:ok,
     Enum.sort_by(for({_, :ok, list} <- answers, one <- list, do: one), &{&1.node, &1.index})}
  end

  def run(%{name: name} = members, _of_one, _call) do
    nodes = members |> Members.standings() |> Map.keys() |> Enum.sort()
    example = inspect({name, List.first(nodes) || node()})

    {:error,
     Error.new(
       :unsupported,
       "#{inspect(name)} stands for the engines of a cluster here, and this is done to one of them. Say " <>
         "which by its node: `#{example}`.",
       %{"nodes" => Enum.map(nodes, &Atom.to_string/1)}
     )}
  end

  # Of the first that can say, the one of this node before others.
  defp anywhere(members, operation, call, asked) do
    with :ok <- Members.await(members, call) do
      nodes = for {_load, member} <- Members.serving(members), do: member.index

      case nodes -- asked do
        [] ->
          anywhere(members, operation, call, [])

        [node | _] ->
          with {:error, %Error{reason: reason}} when reason in @elsewhere <-
                 ask(members, node, operation, call),
               do: anywhere(members, operation, call, [node | asked])
      end
    end
  end

  defp ask(%{name: name}, node, operation, call) when node == node(),
    do: Engine.Operations.run(name, operation, call)

  defp ask(%{name: name}, node, operation, call),
    do: Remote.Call.run(node, name, {:run, operation}, call)

  # At once; as `{node, :ok, result}` or `{node, :error, error}`.
  defp everywhere(%{name: name} = members, nodes, operation, call) do
    Inbox.run(fn inbox ->
      calls =
        for node <- nodes, node != node() do
          {node, Remote.Call.open(node, name, {:run, operation}, call, inbox)}
        end

      here =
        if node() in nodes,
          do: [tagged(node(), ask(members, node(), operation, call))],
          else: []

      collect(
        Map.new(calls, fn {node, %{address: {_, ref}} = remote} -> {ref, {node, remote}} end),
        here,
        call,
        inbox
      )
    end)
  end

  defp collect(calls, answers, _call, _inbox) when calls == %{}, do: answers

  defp collect(calls, answers, call, inbox) do
    case Inbox.next(inbox, Remote.Call.patience(call.deadline)) do
      :timeout ->
        late =
          for {_ref, {node, remote}} <- calls do
            Remote.Call.close(remote)
            tagged(node, Remote.Call.last(remote, :timeout))
          end

        late ++ answers

      {ref, _} = message ->
        {{node, remote}, calls} = Map.pop!(calls, ref)
        Remote.Call.close(remote)
        answer = tagged(node, Remote.Call.last(remote, message))
        collect(calls, [answer | answers], call, inbox)
    end
  end

  defp tagged(node, {tag, value}), do: {node, tag, value}

  defp on(error, node),
    do: %{error | details: Map.put_new(error.details, "node", Atom.to_string(node))}
end
