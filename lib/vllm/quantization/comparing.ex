defmodule VLLM.Quantization.Comparing do
  @moduledoc false
  # Measures models one after another, each in a worker of its own that is gone
  # before the next begins, and has their measurements compared. These lie in a
  # folder of the worker that compares, which is removed with it, whatever ends it.

  alias VLLM.Bridge.{Deadline, Session}
  alias VLLM.{Error, Options, Params, Terminal, Tools}
  alias VLLM.Quantization.Comparison
  alias VLLM.Quantization.Comparison.Row

  @start_timeout 60_000

  @doc "What `VLLM.Quantization.compare/2` answers."
  @spec compare(term(), keyword() | map()) :: {:ok, Comparison.t()} | {:error, Error.t()}
  def compare(models, options) do
    with {:ok, [first | _] = models} <- models(models),
         {:ok, questions} <- questions(models, options),
         {_model, known, _params, _where} = hd(questions),
         reference = known.reference || first,
         {:ok, questions} <- with_reference(questions, reference, options),
         :ok <- several(questions) do
      Terminal.line(known.progress, &compare(questions, reference, known, &1))
    end
  end

  defp models([model | _] = models) when is_binary(model), do: {:ok, Enum.uniq(models)}

  defp models(_other) do
    message = "Models are a list of folders, files or hub ids, as strings."
    {:error, Error.new(:invalid_option, message, %{"option" => "models"})}
  end

  # Of each model how it is measured; the options are the same for all.
  defp questions(models, options) do
    Params.map(models, fn model ->
      with {:ok, known, params, where} <- Tools.question(model, options, Options.compare()),
           do: {:ok, {model, known, params, where}}
    end)
  end

  defp with_reference(questions, reference, options) do
    if List.keymember?(questions, reference, 0) do
      {:ok, questions}
    else
      with {:ok, own} <- questions([reference], options), do: {:ok, own ++ questions}
    end
  end

  defp several([_, _ | _]), do: :ok

  defp several(_one) do
    message = "There is only one model. Give another one to compare it with."
    {:error, Error.new(:invalid_option, message, %{"option" => "models"})}
  end

  defp compare([{_model, _known, _params, where} | _] = questions, reference, known, show) do
    deadline = Deadline.new(known.timeout)

    result =
      Session.run(:job, [timeout: start_timeout(deadline)] ++ where, fn session ->
        with {:ok, %{"path" => folder}} <- ask(session, "workspace", %{}, deadline),
             {:ok, measured} <- measure_all(questions, reference, folder, deadline, show),
             others = for({_model, {:ok, path}} <- measured, do: path),
             {_, {:ok, path}} = List.keyfind(measured, reference, 0),
             params = %{"reference" => path, "others" => others},
             {:ok, rows} <- ask(session, "compare", params, deadline) do
          {:ok, Comparison.new(reference, known.texts, merge(measured, rows))}
        end
      end)

    with {:error, error} <- result, do: {:error, late(error, deadline)}
  end

  # Without the reference there is nothing to compare with, and so it is without anything else.
  defp measure_all(questions, reference, folder, deadline, show) do
    # The reference first: what cannot be compared need not be measured.
    {own, others} = Enum.split_with(questions, &(elem(&1, 0) == reference))

    measured =
      Enum.reduce_while(own ++ others, [], fn {model, _, _, _} = question, measured ->
        path = Path.join(folder, Integer.to_string(length(measured)))

        case measure(question, path, deadline, show) do
          {:error, error} when model == reference -> {:halt, {:error, error}}
          {:error, %Error{reason: :timeout} = error} -> {:halt, {:error, error}}
          result -> {:cont, [{model, result} | measured]}
        end
      end)

    with [_ | _] <- measured do
      if Enum.all?(measured, fn {model, result} ->
           model == reference or match?({:error, _}, result)
         end),
         do: measured |> hd() |> elem(1),
         else: {:ok, in_order(measured, questions)}
    end
  end

  defp in_order(measured, questions) do
    for {model, _known, _params, _where} <- questions, do: List.keyfind(measured, model, 0)
  end

  defp measure({model, known, params, where}, path, deadline, show) do
    params = Map.merge(params, %{"out" => path, "max_tokens" => known.max_tokens})
    params = if known.texts, do: Map.put(params, "texts", known.texts), else: params

    result =
      Session.run(:job, [timeout: start_timeout(deadline)] ++ where, fn session ->
        left = Deadline.remaining(deadline)
        Session.follow(session, "measure", params, left, :infinity, &tell(&1, model, show))
      end)

    case result do
      {:ok, _figures} -> {:ok, path}
      {:error, error} -> {:error, Options.or_ours(error, Options.compare())}
    end
  end

  defp tell(%{"phase" => phase} = progress, model, show) do
    show.(fn ->
      case progress do
        %{"done" => done, "total" => total} when is_integer(done) and is_integer(total) ->
          "#{model}: #{phase} #{done} of #{total}"

        _ ->
          "#{model}: #{phase}"
      end
    end)
  end

  defp ask(session, method, params, deadline),
    do: Session.call(session, method, params, Deadline.remaining(deadline))

  defp late(%Error{reason: :timeout} = error, deadline) do
    if Deadline.passed?(deadline) do
      message =
        "The models were not measured in time. Give it more with `timeout:`, or fewer tokens to " <>
          "measure with `max_tokens:`."

      Error.new(:timeout, message, %{"option" => "timeout"})
    else
      error
    end
  end

  defp late(error, _deadline), do: error

  defp start_timeout(deadline), do: min(Deadline.remaining(deadline), @start_timeout)

  # Rows are of those that were measured, in their order.
  defp merge([], []), do: []

  defp merge([{model, {:ok, _path}} | measured], [row | rows]),
    do: [%{Row.from_wire(row) | model: model} | merge(measured, rows)]

  defp merge([{model, {:error, error}} | measured], rows),
    do: [Row.failed(model, error) | merge(measured, rows)]
end
