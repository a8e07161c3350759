"""Find the rows behind a wrong diagnosis, and doubtful labels, with scikit-learn."""

from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from turnover.integrations.sklearn import TurnoverClassifier  # turn-over

X, y = load_breast_cancer(return_X_y=True, as_frame=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
model = TurnoverClassifier(random_state=0).fit(X_train, y_train)  # turn-over
print(f"test accuracy {model.score(X_test, y_test):.3f}")

wrong = X_test.index[model.predict(X_test) != y_test][0]
influence = model.influence_on(X_test.loc[[wrong]], y_test.loc[[wrong]]).loc[wrong]
print(f"\nrow {wrong} is predicted wrongly; the training rows that helped its true class most:")
print(influence.nlargest(5, "score"))
print("\nand the rows that harmed it most:")
print(influence.nsmallest(5, "score"))
print("\ndoubtful labels:")
print(model.self_influence().nlargest(5, "z"))
